"""The launches of the depthwise convolution: forward and the gradient of its input (dwconv.py)."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.backends.gpu.layout import flat
from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.dwconv_images import (
    Image,
    as_image,
    as_image_like,
    as_rows,
    channels_last,
    filled,
    in_twos,
    rounding,
    sides,
    viewed,
    weight_strides,
)
from convnext_kernels.backends.triton.dwconv_problem import Call, block_of, interpretable, line_options, problem_of
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


def _on_tensor_cores(
    source: Image,
    call: Call,
    bias: Tensor | None,
    added: Image | None,
    target: Image,
    gradient: bool,
    config: Mapping[str, Any],
) -> None:
    """What `convolve` does, with a plan of dwconv_toeplitz_plan.py."""
    x, weight, compute_dtype = source.tensor, call.weight, call.compute_dtype
    n, channels, height, width = x.shape
    kernel_h, kernel_w = weight.shape[2:]
    window = dwconv_toeplitz_plan.window(width, kernel_w)
    assert window is not None
    shared = {"C": channels, "KH": kernel_h, "LENGTH": window.length, "FIRST": window.first, "enable_fp_fusion": True}
    copies = torch.empty(channels, kernel_h + 1, 8, window.length, dtype=compute_dtype, device=x.device)
    block = 4096 if device.interpreted() else 1024
    launch(copies_kernel, (triton.cdiv(copies.numel(), block),))(
        weight, copies, WEIGHT=weight_strides(weight), KW=kernel_w, FLIP=gradient, BLOCK=block, num_warps=8, **shared
    )
    tile = {name: int(config[name]) for name in ("CB", "NB", "GB", "R")}
    row_blocks = triton.cdiv(height, tile["GB"] * tile["R"])
    grid = (
        triton.cdiv(channels, tile["CB"]),
        triton.cdiv(width, window.out) * row_blocks,
        triton.cdiv(n, tile["NB"]),
    )
    launch(toeplitz_kernel, grid)(
        x,
        copies,
        None if bias is None else flat(bias),
        None if added is None else added.tensor,
        target.tensor,
        n,
        source.stride_n,
        target.stride_n,
        0 if added is None else added.stride_n,
        height,
        width,
        ROUND=rounding(x.dtype, compute_dtype),
        WIN=window.inside,
        LEFT=window.left,
        BN=window.out,
        num_warps=int(config["warps"]),
        num_stages=2,
        **tile,
        **shared,
    )


def _lines(
    source: Image,
    call: Call,
    bias: Tensor | None,
    added: Image | None,
    target: Image,
    gradient: bool,
    config: Mapping[str, Any],
    problem: dwconv_plan.Problem,
) -> None:
    """What `convolve` does, for a kernel of one row or one column."""
    weight, (n, channels, height, width) = call.weight, problem[:4]
    tile = int(config["Q"])
    vector = int(config["V"])
    lanes = n * (channels // vector) * triton.cdiv(dwconv_plan.line(problem).width, tile)
    block = block_of(lanes)
    strips = triton.cdiv(dwconv_plan.line(problem).height, config["strip"])
    launch(lines_kernel, (triton.cdiv(lanes, block), strips))(
        source.tensor,
        weight,
        None if bias is None else flat(bias),
        None if added is None else added.tensor,
        target.tensor,
        n,
        source.stride_n,
        target.stride_n,
        0 if added is None else added.stride_n,
        height,
        width,
        config["strip"],
        FLIP=gradient,
        ROUND_WEIGHT=rounding(weight.dtype, call.compute_dtype),
        BLOCK=block,
        num_warps=max(1, min(8, block // device.lanes())),
        **line_options(problem, call, tile, vector, source),
    )


def convolve(
    x: Tensor, call: Call, bias: Tensor | None, residual: Tensor | None, out: Tensor, gradient: bool
) -> Tensor:
    """Write the convolution of x (+ bias, + residual) into `out`, whatever its strides.

    gradient: x is the gradient of the call's result, `out` that of its input.
    """
    weight, dilation, stride, compute_dtype = call.weight, call.dilation, call.stride, call.compute_dtype
    larger = out if gradient else x
    n, channels = larger.shape[:2]
    depth, height, width = sides(larger)
    out_depth, out_height, out_width = sides(out)
    kernel_d, kernel_h, kernel_w = sides(weight)
    source = as_image(x)
    target = viewed(out) or as_image(torch.empty_like(out, memory_format=channels_last(out)))
    added = None if residual is None else as_image_like(residual, target)
    problem = problem_of(larger, call, *(image for image in (source, target, added) if image is not None))
    if larger.dim() == 4 and dwconv_plan.two_channels(channels, stride, device.gpu().arch):
        problem = problem._replace(x2=all(image is None or in_twos(image) for image in (source, target, added)))
    plan = dwconv_plan.forward(problem, device.gpu())
    kernel, config = plan.name.partition("-")[0], plan.config
    if device.interpreted():
        many = kernel_h * height > (150 if problem.few else 300)
        if kernel == "rows" and stride == 1 and many and not problem.volume:
            kernel, config = "rolling", {"Q": config["Q"], "strip": 1}  # loads a row of x once, not per kernel row
        config = interpretable(config, problem)
    if kernel == "toeplitz":
        _on_tensor_cores(source, call, bias, added, target, gradient, config)
        return filled(target, out)
    if kernel == "lines":
        _lines(source, call, bias, added, target, gradient, config, problem)
        return filled(target, out)
    tile = dwconv_plan.columns(problem, config, gradient)
    # With a stride all groups of columns of a gradient begin at even ones.
    between = tile - tile % stride if gradient and tile > 1 else tile
    x2 = bool(config.get("X2"))
    lanes = n * (channels // 2 if x2 else channels) * triton.cdiv(out_width - (tile - between), between)
    block = block_of(lanes)
    round_weight = rounding(weight.dtype, compute_dtype)
    weight = as_rows(weight)
    strides = weight_strides(weight)
    packed = bool(config.get("pack"))
    if packed:
        weight, strides = packed_weight(weight, round_weight), (1, kernel_w * channels, channels)
    arguments = {
        "x_ptr": source.tensor,
        "weight_ptr": weight,
        "bias_ptr": None if bias is None else flat(bias),
        "residual_ptr": None if added is None else added.tensor,
        "y_ptr": target.tensor,
        "samples": n,
        "x_sn": source.stride_n,
        "y_sn": target.stride_n,
        "residual_sn": 0 if added is None else added.stride_n,
        "C": channels,
        "KH": kernel_h,
        "KW": kernel_w,
        "DH": dilation[0],
        "DW": dilation[1],
        "WEIGHT": strides,
        "FLIP": gradient,
        "ROUND": rounding(x.dtype, compute_dtype),
        "ROUND_WEIGHT": None if packed else round_weight,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // device.lanes())),
        "enable_fp_fusion": True,
    }
    programs = triton.cdiv(lanes, block)
    if kernel == "plane":  # height and width are part of the compiled kernel
        arguments |= {"X": source.strides, "Y": target.strides}
        arguments |= {"H": height, "W": width, "CHANNELS_FIRST": target.channels_first}
        launch(plane_kernel, (programs,))(**arguments, one=1)
    else:
        arguments |= {"X_FIRST": source.channels_first, "Y_FIRST": target.channels_first}
        arguments |= {"height": height, "width": width, "Q": tile, "EDGES": dwconv_plan.edges(problem, tile), "X2": x2}
        if kernel == "rolling":
            strip = config["strip"]
            strips = triton.cdiv(triton.cdiv(height, dilation[0]), strip)
            launch(rolling_kernel, (programs, strips * dilation[0]))(**arguments, strip=strip)
        else:
            pair = bool(config["pair"])
            pairs = triton.cdiv(triton.cdiv(height, dilation[0]), 2) * dilation[0]
            strides = (1, stride) if gradient else (stride, 1)
            arguments |= {"PAIR": pair, "DOWN": strides[0], "UP": strides[1]}
            arguments |= {"depth": depth if problem.volume else None, "KD": kernel_d}
            launch(rows_kernel, (programs, pairs if pair else out_height, out_depth))(**arguments)
    return filled(target, out)
