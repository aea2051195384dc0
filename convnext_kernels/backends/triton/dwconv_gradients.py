"""The launches of the gradients of the depthwise convolution's weight and bias (dwconv.py)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.dwconv_images import Image, as_image, as_rows, rounding, sides, weight_strides
from convnext_kernels.backends.triton.dwconv_problem import Call, interpretable, line_options, problem_of
from convnext_kernels.backends.triton.kernels.dwconv_lines import line_partials_kernel
from convnext_kernels.backends.triton.kernels.dwconv_toeplitz import toeplitz_partials_kernel
from convnext_kernels.backends.triton.kernels.dwconv_wgrad import finish_kernel, partials_kernel
from convnext_kernels.backends.triton.launch import launch
from convnext_kernels.backends.triton.plans import dwconv_plan, dwconv_toeplitz_plan


class Launch(NamedTuple):
    """A kernel that writes partial sums, its grid, the number of these sums, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    sums: int
    options: dict[str, Any]


def _sums(parts: int, call: Call) -> Tensor:
    """Partial sums (parts, taps + 1, C)."""
    weight = call.weight
    return torch.empty(parts, weight[0].numel() + 1, weight.shape[0], dtype=torch.float32, device=weight.device)


def _block(block_c: int, positions: int) -> dict[str, Any]:
    """The lanes of a program with `block_c` channels, and its warps."""
    block = 128
    if device.interpreted():  # as few programs as the strips allow
        block = block_c * min(triton.next_power_of_2(positions), 4096 // block_c)
    return {"BC": block_c, "BLOCK": block, "num_warps": max(1, min(4, block // device.lanes()))}


def _columns(
    gradient: Image, image: Image, call: Call, config: Mapping[str, Any], problem: dwconv_plan.Problem
) -> Launch:
    """A tile of columns per thread."""
    n, channels = problem[:2]
    out_depth, out_height, out_width = sides(gradient.tensor)
    kernel_d, kernel_h, kernel_w = sides(call.weight)
    tile, kernel_rows, strip, parts, block_c = (config[name] for name in ("Q", "R", "strip", "parts", "BC"))
    (down, across), stride = call.dilation, call.stride
    lattices = down if stride == 1 else 1
    strips = triton.cdiv(triton.cdiv(out_height, lattices), strip) * lattices
    kernel_blocks = kernel_d * triton.cdiv(kernel_h, kernel_rows)
    options = _block(block_c, n * out_depth * triton.cdiv(out_width, tile))
    options |= {"C": channels, "KD": kernel_d, "KH": kernel_h, "KW": kernel_w, "DH": down, "DW": across}
    options |= {"DY_FIRST": gradient.channels_first, "X_FIRST": image.channels_first, "STRIDE": stride}
    options |= {"Q": tile, "EDGES": dwconv_plan.edges(problem, tile), "R": kernel_rows, "parts": parts, "strip": strip}
    options |= {"depth": problem.depth if problem.volume else None, "enable_fp_fusion": True}
    grid = triton.cdiv(channels, block_c) * parts, strips, kernel_blocks
    return Launch(partials_kernel, grid, strips * parts, options)


def _lines(x: Tensor, call: Call, config: Mapping[str, Any], problem: dwconv_plan.Problem) -> Launch:
    """For a kernel of one row or one column."""
    n, channels, line = *x.shape[:2], dwconv_plan.line(problem)
    tile, strip, parts, block_c, vector = (config[name] for name in ("Q", "strip", "parts", "BC", "V"))
    strips = triton.cdiv(line.height, strip)
    options = line_options(problem, call, tile, vector) | _block(block_c, n * triton.cdiv(line.width, tile))
    options |= {"parts": parts, "strip": strip}
    del options["WEIGHT"]
    grid = triton.cdiv(channels, vector * block_c) * parts, strips
    return Launch(line_partials_kernel, grid, strips * parts, options)


def _on_tensor_cores(x: Tensor, call: Call, config: Mapping[str, Any]) -> Launch:
    """With a plan of dwconv_toeplitz_plan.py."""
    channels, (kernel_h, kernel_w), parts = x.shape[1], call.weight.shape[2:], config["parts"]
    window = dwconv_toeplitz_plan.window(x.shape[3], kernel_w)
    assert window is not None
    tile = {name: int(config[name]) for name in ("CB", "NB", "GB", "R", "KB")}
    options = {"C": channels, "KH": kernel_h, "KW": kernel_w, "TAPS": triton.next_power_of_2(kernel_w), "parts": parts}
    options |= {"WIN": window.inside, "LEFT": window.left, "BN": window.out, "num_warps": int(config["warps"])}
    options |= {"num_stages": 1, "enable_fp_fusion": True}
    grid = triton.cdiv(channels, tile["CB"]), triton.cdiv(kernel_h, tile["KB"]), parts
    return Launch(toeplitz_partials_kernel, grid, parts, tile | options)


def _partials(
    gradient: Image, image: Image, call: Call, config: Mapping[str, Any], problem: dwconv_plan.Problem
) -> Tensor:
    """Partial sums of the weight gradient and, last, of the bias gradient."""
    x = image.tensor
    if "KB" in config:
        step = _on_tensor_cores(x, call, config)
    elif "V" in config:
        step = _lines(x, call, config, problem)
    else:
        step = _columns(gradient, image, call, config, problem)
    partials = _sums(step.sums, call)
    launch(step.kernel, step.grid)(
        gradient.tensor,
        x,
        partials,
        x.shape[0],
        gradient.stride_n,
        image.stride_n,
        height=problem.height,
        width=problem.width,
        ROUND_DY=rounding(gradient.tensor.dtype, call.compute_dtype),
        ROUND=rounding(x.dtype, call.compute_dtype),
        **step.options,
    )
    return partials


def parameter_gradients(
    dy: Tensor, call: Call, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dw, db) like weight and bias, None for a gradient that is not needed.

    Bitwise the same every time: programs write partial sums, which a second kernel adds in a fixed order.
    """
    x, weight, bias = call[:3]
    channels, (kernel_d, kernel_h, kernel_w) = x.shape[1], sides(weight)
    dw = torch.empty_like(weight) if needs_weight else None
    written = weight if dw is None else dw
    if written is dw and weight.dim() == 5 and not weight.is_contiguous():  # its planes may not be rows of one another
        written = torch.empty_like(weight, memory_format=torch.contiguous_format)
    db = torch.empty_like(bias) if needs_bias else None
    gradient, image = as_image(dy), as_image(x)
    problem = problem_of(x, call, gradient, image)
    config = dwconv_plan.weight(problem, device.gpu()).config
    if device.interpreted():
        config = interpretable(config, problem)
    partials = _partials(gradient, image, call, config, problem)
    # Wide programs take half the instructions, but there must be enough of them.
    block_l = 4096 if device.interpreted() else 256 if partials[0].numel() >= 2**15 else 64
    rows = as_rows(written)
    launch(finish_kernel, (triton.cdiv(partials[0].numel(), block_l),))(
        partials,
        None if dw is None else rows,
        db,
        len(partials),
        C=channels,
        KH=kernel_d * kernel_h,
        KW=kernel_w,
        DW=weight_strides(rows),
        BLOCK_P=8,
        BLOCK_L=block_l,
        num_warps=4,
        enable_fp_fusion=True,
    )
    if dw is not None and written is not dw:
        dw.copy_(written)
    return dw, db
