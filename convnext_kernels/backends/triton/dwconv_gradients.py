"""The launches of the gradients of the depthwise convolution's weight and bias (dwconv.py)."""

from collections.abc import Mapping
from typing import Any

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


def _sums(parts: int, call: Call, deterministic: bool) -> Tensor:
    """Partial sums (parts, taps + 1, C); a single slot of zeros if programs add atomically."""
    weight = call.weight
    taps, channels = weight[0].numel(), weight.shape[0]
    if deterministic:
        return torch.empty(parts, taps + 1, channels, dtype=torch.float32, device=weight.device)
    return torch.zeros(1, taps + 1, channels, dtype=torch.float32, device=weight.device)


def _partials(
    gradient: Image,
    image: Image,
    call: Call,
    config: Mapping[str, Any],
    problem: dwconv_plan.Problem,
    deterministic: bool,
) -> Tensor:
    """Partial sums of the weight gradient and, last, of the bias gradient."""
    dy, x, dilation, stride = gradient.tensor, image.tensor, call.dilation, call.stride
    n, channels = x.shape[:2]
    depth, height, width = sides(x)
    out_depth, out_height, out_width = sides(dy)
    kernel_d, kernel_h, kernel_w = sides(call.weight)
    tile, kernel_rows, strip, parts, block_c = (int(config[name]) for name in ("Q", "R", "strip", "parts", "BC"))
    block = 128
    if device.interpreted():  # as few programs as the strips allow
        positions = n * out_depth * triton.cdiv(out_width, tile)
        block = block_c * min(triton.next_power_of_2(positions), 4096 // block_c)
    lattices = dilation[0] if stride == 1 else 1
    strips = triton.cdiv(triton.cdiv(out_height, lattices), strip) * lattices
    partials = _sums(strips * parts, call, deterministic)
    kernel_blocks = kernel_d * triton.cdiv(kernel_h, kernel_rows)
    launch(partials_kernel, (triton.cdiv(channels, block_c) * parts, strips, kernel_blocks))(
        dy,
        x,
        partials,
        n,
        gradient.stride_n,
        image.stride_n,
        depth if problem.volume else None,
        height,
        width,
        parts,
        strip,
        C=channels,
        KD=kernel_d,
        KH=kernel_h,
        KW=kernel_w,
        DH=dilation[0],
        DW=dilation[1],
        DY_FIRST=gradient.channels_first,
        X_FIRST=image.channels_first,
        ROUND_DY=rounding(dy.dtype, call.compute_dtype),
        ROUND=rounding(x.dtype, call.compute_dtype),
        ATOMIC=not deterministic,
        Q=tile,
        EDGES=dwconv_plan.edges(problem, tile),
        R=kernel_rows,
        STRIDE=stride,
        BC=block_c,
        BLOCK=block,
        num_warps=max(1, min(4, block // device.lanes())),
        enable_fp_fusion=True,
    )
    return partials


def _line_partials(
    gradient: Image,
    image: Image,
    call: Call,
    config: Mapping[str, Any],
    problem: dwconv_plan.Problem,
    deterministic: bool,
) -> Tensor:
    """What `_partials` does, for a kernel of one row or one column."""
    dy, x = gradient.tensor, image.tensor
    n, channels, height, width = x.shape
    line = dwconv_plan.line(problem)
    tile, strip, parts, block_c = (int(config[name]) for name in ("Q", "strip", "parts", "BC"))
    vector = int(config["V"])
    block = 128
    if device.interpreted():  # as few programs as the strips allow
        positions = n * triton.cdiv(line.width, tile)
        block = block_c * min(triton.next_power_of_2(positions), 4096 // block_c)
    strips = triton.cdiv(line.height, strip)
    partials = _sums(strips * parts, call, deterministic)
    options = line_options(problem, call, tile, vector, image)
    del options["WEIGHT"]
    launch(line_partials_kernel, (triton.cdiv(channels, vector * block_c) * parts, strips))(
        dy,
        x,
        partials,
        n,
        gradient.stride_n,
        image.stride_n,
        height,
        width,
        parts,
        strip,
        ROUND_DY=rounding(dy.dtype, call.compute_dtype),
        ATOMIC=not deterministic,
        BC=block_c,
        BLOCK=block,
        num_warps=max(1, min(4, block // device.lanes())),
        **options,
    )
    return partials


def _partials_on_tensor_cores(
    gradient: Image, image: Image, call: Call, config: Mapping[str, Any], deterministic: bool
) -> Tensor:
    """What `_partials` does, with a plan of dwconv_toeplitz_plan.py."""
    dy, x = gradient.tensor, image.tensor
    n, channels, height, width = x.shape
    kernel_h, kernel_w = call.weight.shape[2:]
    window = dwconv_toeplitz_plan.window(width, kernel_w)
    assert window is not None
    tile = {name: int(config[name]) for name in ("CB", "NB", "GB", "R", "KB")}
    parts = int(config["parts"])
    partials = _sums(parts, call, deterministic)
    launch(toeplitz_partials_kernel, (triton.cdiv(channels, tile["CB"]), triton.cdiv(kernel_h, tile["KB"]), parts))(
        dy,
        x,
        partials,
        n,
        gradient.stride_n,
        image.stride_n,
        height,
        width,
        parts,
        C=channels,
        KH=kernel_h,
        KW=kernel_w,
        ROUND_DY=rounding(dy.dtype, call.compute_dtype),
        ROUND=rounding(x.dtype, call.compute_dtype),
        ATOMIC=not deterministic,
        WIN=window.inside,
        LEFT=window.left,
        BN=window.out,
        TAPS=triton.next_power_of_2(kernel_w),
        num_warps=int(config["warps"]),
        num_stages=1,
        enable_fp_fusion=True,
        **tile,
    )
    return partials


def parameter_gradients(
    dy: Tensor, call: Call, needs_weight: bool, needs_bias: bool, deterministic: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dw, db) like weight and bias, None for a gradient that is not needed.

    Bitwise the same every time: programs write partial sums, which a second kernel adds in a fixed order. With
    `deterministic=False` they are added atomically, which saves their memory: 4 (taps + 1) C bytes for each of at
    most a few hundred parts.
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
    if "KB" in config:
        partials = _partials_on_tensor_cores(gradient, image, call, config, deterministic)
    elif "V" in config:
        partials = _line_partials(gradient, image, call, config, problem, deterministic)
    else:
        partials = _partials(gradient, image, call, config, problem, deterministic)
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
