"""The launches of the depthwise convolution: forward and the gradient of its input (dwconv.py)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.backends.gpu.layout import vector
from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.dwconv_images import (
    Image,
    as_image,
    as_rows,
    channels_last,
    filled,
    in_twos,
    rounding,
    sides,
    viewed,
    weight_strides,
)
from convnext_kernels.backends.triton.dwconv_problem import (
    Call,
    block_options,
    interpretable,
    line_options,
    problem_of,
    programs_of,
)
from convnext_kernels.backends.triton.kernels.dwconv_forward import pack_kernel, plane_kernel, rolling_kernel
from convnext_kernels.backends.triton.kernels.dwconv_lines import lines_kernel
from convnext_kernels.backends.triton.kernels.dwconv_rows import rows_kernel
from convnext_kernels.backends.triton.kernels.dwconv_toeplitz import copies_kernel, toeplitz_kernel
from convnext_kernels.backends.triton.launch import launch
from convnext_kernels.backends.triton.plans import dwconv_plan, dwconv_toeplitz_plan


def packed_weight(weight: Tensor, round_to: tl.dtype | None) -> Tensor:
    """(C, 1, KH, KW) as (KH, KW, C) in fp32, rounded to `round_to` before."""
    channels, _, kernel_h, kernel_w = weight.shape
    packed = torch.empty(kernel_h, kernel_w, channels, dtype=torch.float32, device=weight.device)
    block = 4096 if device.interpreted() else 256
    strides = weight_strides(weight)
    config = {"BLOCK": block, "num_warps": 8, "enable_fp_fusion": True}
    launch(pack_kernel, (triton.cdiv(weight.numel(), block),))(
        weight, packed, C=channels, KH=kernel_h, KW=kernel_w, WEIGHT=strides, ROUND=round_to, **config
    )
    return packed


class Launch(NamedTuple):
    """A kernel, its grid, the weight as it reads it, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    weight: Tensor
    options: dict[str, Any]


def _on_tensor_cores(x: Tensor, call: Call, gradient: bool, config: Mapping[str, Any]) -> Launch:
    """With a plan of dwconv_toeplitz_plan.py."""
    weight, (n, channels, height, width) = call.weight, x.shape
    kernel_h, kernel_w = weight.shape[2:]
    window = dwconv_toeplitz_plan.window(width, kernel_w)
    assert window is not None
    shared = {"C": channels, "KH": kernel_h, "LENGTH": window.length, "FIRST": window.first, "enable_fp_fusion": True}
    copies = torch.empty(channels, kernel_h + 1, 8, window.length, dtype=call.compute_dtype, device=x.device)
    block = 4096 if device.interpreted() else 1024
    launch(copies_kernel, (triton.cdiv(copies.numel(), block),))(
        weight, copies, WEIGHT=weight_strides(weight), KW=kernel_w, FLIP=gradient, BLOCK=block, num_warps=8, **shared
    )
    tile = {name: int(config[name]) for name in ("CB", "NB", "GB", "R")}
    row_blocks = triton.cdiv(height, tile["GB"] * tile["R"])
    column_blocks = triton.cdiv(width, window.out)
    grid = triton.cdiv(channels, tile["CB"]), column_blocks * row_blocks, triton.cdiv(n, tile["NB"])
    options = {"WIN": window.inside, "LEFT": window.left, "BN": window.out, "num_warps": int(config["warps"])}
    options |= {"height": height, "width": width, "num_stages": 2}
    return Launch(toeplitz_kernel, grid, copies, shared | tile | options)


def _lines(x: Tensor, call: Call, gradient: bool, config: Mapping[str, Any], problem: dwconv_plan.Problem) -> Launch:
    """For a kernel of one row or one column."""
    weight, (n, channels, height, width), line = call.weight, x.shape, dwconv_plan.line(problem)
    tile, vector, strip = config["Q"], config["V"], config["strip"]
    lanes = n * (channels // vector) * triton.cdiv(line.width, tile)
    options = line_options(problem, call, tile, vector) | block_options(lanes)
    options |= {"FLIP": gradient, "ROUND_WEIGHT": rounding(weight.dtype, call.compute_dtype)}
    options |= {"height": height, "width": width, "strip": strip}
    return Launch(lines_kernel, (programs_of(lanes, options), triton.cdiv(line.height, strip)), weight, options)


def _columns(
    kernel: str,
    source: Image,
    target: Image,
    call: Call,
    gradient: bool,
    config: Mapping[str, Any],
    problem: dwconv_plan.Problem,
) -> Launch:
    """A tile of columns, or a whole plane, per thread."""
    n, channels, height, width = problem[:4]
    out_depth, out_height, out_width = sides(target.tensor)
    kernel_d, kernel_h, kernel_w = sides(call.weight)
    stride, (down, across) = call.stride, call.dilation
    tile = dwconv_plan.columns(problem, config, gradient)
    # With a stride all groups of columns of a gradient begin at even ones.
    between = tile - tile % stride if gradient and tile > 1 else tile
    x2 = bool(config.get("X2"))
    lanes = n * (channels // 2 if x2 else channels) * triton.cdiv(out_width - (tile - between), between)
    round_weight = rounding(call.weight.dtype, call.compute_dtype)
    weight = as_rows(call.weight)
    strides = weight_strides(weight)
    if config.get("pack"):
        weight, strides, round_weight = packed_weight(weight, round_weight), (1, kernel_w * channels, channels), None
    options = block_options(lanes)
    options |= {"C": channels, "KH": kernel_h, "KW": kernel_w, "DH": down, "DW": across, "FLIP": gradient}
    options |= {"WEIGHT": strides, "ROUND_WEIGHT": round_weight}
    programs = programs_of(lanes, options)
    if kernel == "plane":  # height and width are part of the compiled kernel
        options |= {"X": source.strides, "Y": target.strides, "CHANNELS_FIRST": target.channels_first}
        return Launch(plane_kernel, (programs,), weight, options | {"H": height, "W": width, "one": 1})
    options |= {"X_FIRST": source.channels_first, "Y_FIRST": target.channels_first}
    options |= {"height": height, "width": width, "Q": tile, "EDGES": dwconv_plan.edges(problem, tile), "X2": x2}
    rows = triton.cdiv(height, down)  # of one residue
    if kernel == "rolling":
        grid = programs, triton.cdiv(rows, config["strip"]) * down
        return Launch(rolling_kernel, grid, weight, options | {"strip": config["strip"]})
    pair = bool(config["pair"])
    grid = programs, triton.cdiv(rows, 2) * down if pair else out_height, out_depth
    options |= {"PAIR": pair, "DOWN": 1 if gradient else stride, "UP": stride if gradient else 1}
    options |= {"depth": problem.depth if problem.volume else None, "KD": kernel_d}
    return Launch(rows_kernel, grid, weight, options)


def convolve(
    x: Tensor, call: Call, bias: Tensor | None, residual: Tensor | None, out: Tensor, gradient: bool
) -> Tensor:
    """Write the convolution of x (+ bias, + residual) into `out`, whatever its strides.

    gradient: x is the gradient of the call's result, `out` that of its input.
    """
    larger = out if gradient else x
    source = as_image(x)
    target = viewed(out) or as_image(torch.empty_like(out, memory_format=channels_last(out)))
    added = None if residual is None else as_image(residual, target)
    problem = problem_of(larger, call, *(image for image in (source, target, added) if image is not None))
    if larger.dim() == 4 and dwconv_plan.two_channels(larger.shape[1], call.stride, device.gpu().arch):
        problem = problem._replace(x2=all(image is None or in_twos(image) for image in (source, target, added)))
    plan = dwconv_plan.forward(problem, device.gpu())
    kernel, config = plan.name.partition("-")[0], plan.config
    if device.interpreted():
        many = problem.kernel_h * problem.height > (150 if problem.few else 300)
        if kernel == "rows" and call.stride == 1 and many and not problem.volume:
            kernel, config = "rolling", {"Q": config["Q"], "strip": 1}  # loads a row of x once, not per kernel row
        config = interpretable(config, problem)
    if kernel == "toeplitz":
        step = _on_tensor_cores(source.tensor, call, gradient, config)
    elif kernel == "lines":
        step = _lines(source.tensor, call, gradient, config, problem)
    else:
        step = _columns(kernel, source, target, call, gradient, config, problem)
    launch(step.kernel, step.grid)(
        source.tensor,
        step.weight,
        vector(bias),
        None if added is None else added.tensor,
        target.tensor,
        larger.shape[0],
        source.stride_n,
        target.stride_n,
        0 if added is None else added.stride_n,
        ROUND=rounding(x.dtype, call.compute_dtype),
        **step.options,
    )
    return filled(target, out)
