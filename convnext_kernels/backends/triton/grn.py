"""Global response normalisation (ConvNeXt V2) of (N, C, H, W), per sample n and channel c:

    G = ||x[n, :, :, c]||_2,    Nx = G / s,    s = mean_c G + eps,    y = x * (1 + weight * Nx) + bias

With q = weight * sum_hw dy * x, dG = q / s - mean_c(q * G) / s^2, and dG / G = 0 where G = 0:

    dx = dy * (1 + weight * Nx) + x * dG / G,    dweight = sum_n Nx * sum_hw dy * x,    dbias = sum dy

Three launches each for forward and backward: sums over tiles of pixels, the factors of each sample, the result. Bytes
per pixel with 16-bit elements: forward 6C (x twice, y once), backward 10C (dy and x twice, dx once); and 4C (backward
12C) for each tile of 64 pixels. Sums are fp32, so fp16 does not overflow, and are added in a fixed order, without
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.backends.gpu.layout import Rows, finish, flat, output_rows, rows
from convnext_kernels.backends.triton.kernels.pixels import offsets
from convnext_kernels.backends.triton.launch import launch, prepared
from convnext_kernels.backends.triton.layernorm import parameter_gradients
from convnext_kernels.calls import NormCall

BLOCK_P = 64  # pixels of one partial sum
BLOCK_C = 64  # 128 bytes of a 16-bit NHWC row
FINAL_ELEMENTS = 8192  # of a program of the response kernels: 32 a thread
COUNTS = ["pixels", "tiles"]


@triton.jit
def locate(pixels, tiles, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return (sample, tile, pixels, channels, inside) of this program: the channel blocks of a tile are neighbours."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // blocks
    n, t = tile // tiles, tile % tiles
    p = t * BLOCK_P + tl.arange(0, BLOCK_P)
    return n, tile, p, c, (p < pixels)[:, None] & (c < C)[None, :]


@triton.jit
def sum_tiles(partials_ptr, n, tiles, c, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum_t partials[n, t, c] of (N, T, C), in a fixed order."""
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    base = partials_ptr + n.to(tl.int64) * tiles * C
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & (c < C)[None, :]
        acc += tl.load(base + t.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def grn_squares_kernel(
    x_ptr,
    squares_ptr,  # (N, T, C) fp32
    pixels,
    tiles,
    stride_xn,
    stride_xp,
    stride_xc,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of x^2 over tiles of pixels."""
    n, tile, p, c, inside = locate(pixels, tiles, C, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=inside, other=0.0).to(tl.float32)
    tl.store(squares_ptr + tile.to(tl.int64) * C + c, tl.sum(x * x, axis=0), mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def grn_response_kernel(
    squares_ptr, weight_ptr, scale_ptr, tiles, eps, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """scale[n, c] = 1 + weight * Nx; one program per sample."""
    n = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    norm = tl.sqrt_rn(sum_tiles(squares_ptr, n, tiles, c, C, BLOCK_T, BLOCK_C))
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    response = norm / (tl.sum(norm, axis=0) / C + eps)
    tl.store(scale_ptr + n.to(tl.int64) * C + c, 1.0 + weight * response, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def grn_apply_kernel(
    x_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    tiles,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_yn,
    stride_yp,
    stride_yc,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The result: y = x * scale + bias."""
    n, _, p, c, inside = locate(pixels, tiles, C, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    y = (x * scale[None, :] + bias[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets(n, p, c, stride_yn, stride_yp, stride_yc), y, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def grn_bwd_sums_kernel(
    dy_ptr,
    x_ptr,
    squares_ptr,  # three of (N, T, C) fp32
    dy_x_ptr,
    dy_sum_ptr,
    pixels,
    tiles,
    stride_dyn,
    stride_dyp,
    stride_dyc,
    stride_xn,
    stride_xp,
    stride_xc,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of x^2, dy * x and dy over tiles of pixels."""
    n, tile, p, c, inside = locate(pixels, tiles, C, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets(n, p, c, stride_dyn, stride_dyp, stride_dyc), mask=inside, other=0.0).to(tl.float32)
    out = tile.to(tl.int64) * C + c
    tl.store(squares_ptr + out, tl.sum(x * x, axis=0), mask=c < C)
    tl.store(dy_x_ptr + out, tl.sum(dy * x, axis=0), mask=c < C)
    tl.store(dy_sum_ptr + out, tl.sum(dy, axis=0), mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def grn_bwd_response_kernel(
    squares_ptr,
    dy_x_ptr,
    dy_sum_ptr,
    weight_ptr,
    scale_ptr,
    per_x_ptr,
    parameters_ptr,  # (N, 2, C) fp32: dweight and dbias of each sample
    tiles,
    eps,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per sample: scale = 1 + weight * Nx and per_x = dG / G, and its share of the parameters' gradients."""
    n = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    norm = tl.sqrt_rn(sum_tiles(squares_ptr, n, tiles, c, C, BLOCK_T, BLOCK_C))
    dy_x = sum_tiles(dy_x_ptr, n, tiles, c, C, BLOCK_T, BLOCK_C)
    dy_sum = sum_tiles(dy_sum_ptr, n, tiles, c, C, BLOCK_T, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    s = tl.sum(norm, axis=0) / C + eps
    response = norm / s
    q = weight * dy_x
    dnorm = q / s - tl.sum(q * response, axis=0) / C / s
    positive = norm > 0
    per_x = tl.where(positive, dnorm / tl.where(positive, norm, 1.0), 0.0)
    out = n.to(tl.int64) * C + c
    tl.store(scale_ptr + out, 1.0 + weight * response, mask=c < C)
    tl.store(per_x_ptr + out, per_x, mask=c < C)
    tl.store(parameters_ptr + n.to(tl.int64) * (2 * C) + c, dy_x * response, mask=c < C)
    tl.store(parameters_ptr + n.to(tl.int64) * (2 * C) + C + c, dy_sum, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def grn_bwd_apply_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    per_x_ptr,
    dx_ptr,
    pixels,
    tiles,
    stride_dyn,
    stride_dyp,
    stride_dyc,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_dxn,
    stride_dxp,
    stride_dxc,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient: dx = dy * scale + x * per_x."""
    n, _, p, c, inside = locate(pixels, tiles, C, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets(n, p, c, stride_dyn, stride_dyp, stride_dyc), mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0)
    per_x = tl.load(per_x_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0)
    dx = (dy * scale[None, :] + x * per_x[None, :]).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offsets(n, p, c, stride_dxn, stride_dxp, stride_dxc), dx, mask=inside)


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """Return (pixels, tiles of one sample, programs)."""
    samples, channels, height, width = x.shape
    tiles = triton.cdiv(height * width, BLOCK_P)
    return height * width, tiles, samples * tiles * triton.cdiv(channels, BLOCK_C)


def _config(channels: int) -> dict:
    return {"C": channels, "BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C, "num_warps": 4, "enable_fp_fusion": True}


def _final_config(channels: int) -> dict:
    block_c = triton.next_power_of_2(channels)
    block_t = max(1, FINAL_ELEMENTS // max(block_c, 128))
    warps = max(8, min(32, block_c // 1024))
    return {"C": channels, "BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": warps, "enable_fp_fusion": True}


def response(squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    """From sums of x^2 over tiles of pixels, (N, T, C) fp32, return 1 + weight * Nx, (N, C) fp32. One launch."""
    samples, tiles, channels = squares.shape
    scale = torch.empty((samples, channels), dtype=torch.float32, device=squares.device)
    launch(grn_response_kernel, (samples,))(squares, flat(weight), scale, tiles, eps, **_final_config(channels))
    return scale


def response_backward(
    squares: Tensor, dy_x: Tensor, dy_sum: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From sums of x^2, dy * x and dy over tiles of pixels, (N, T, C) fp32 each, return (scale, per_x, parameters).

    dx = dy * scale + x * per_x, both (N, C) fp32; `parameters` (N, 2, C) fp32 holds each sample's dweight and dbias,
    for `layernorm.parameter_gradients` to sum. One launch.
    """
    samples, tiles, channels = squares.shape
    scale, per_x = torch.empty((2, samples, channels), dtype=torch.float32, device=squares.device)
    parameters = torch.empty((samples, 2, channels), dtype=torch.float32, device=squares.device)
    launch(grn_bwd_response_kernel, (samples,))(
        squares, dy_x, dy_sum, flat(weight), scale, per_x, parameters, tiles, eps, **_final_config(channels)
    )
    return scale, per_x, parameters


def apply(x: Rows, scale: Tensor, bias: Tensor, y: Rows) -> None:
    """Write y = x * scale[n, c] + bias[c]; y may be x."""
    pixels, tiles, programs = _tiles(x.tensor)
    config = _config(x.tensor.shape[1])
    arguments = (x.tensor, scale, flat(bias), y.tensor, pixels, tiles, *x[1:], *y[1:])
    launch(grn_apply_kernel, (programs,))(*arguments, **config)


@prepared
def forward(call: NormCall) -> Tensor:
    """GRN of (N, C, H, W); the result has x's dtype and strides."""
    x, weight, bias, eps, *_ = call
    source = rows(x)
    out, target = output_rows(x)
    pixels, tiles, programs = _tiles(x)
    squares = torch.empty((x.shape[0], tiles, x.shape[1]), dtype=torch.float32, device=x.device)
    launch(grn_squares_kernel, (programs,))(source.tensor, squares, pixels, tiles, *source[1:], **_config(x.shape[1]))
    apply(source, response(squares, weight, eps), bias, target)
    return finish(out, target)


@prepared
def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; bitwise the same every time."""
    x, weight, bias, eps, *_ = call
    source, gradient = rows(x), rows(dy)
    pixels, tiles, programs = _tiles(x)
    config = _config(x.shape[1])
    sums = torch.empty((3, x.shape[0], tiles, x.shape[1]), dtype=torch.float32, device=x.device)
    launch(grn_bwd_sums_kernel, (programs,))(
        gradient.tensor, source.tensor, *sums, pixels, tiles, *gradient[1:], *source[1:], **config
    )
    scale, per_x, parameters = response_backward(*sums, weight, eps)
    results = []
    if needs[0]:
        dx, target = output_rows(x)
        strides = (*gradient[1:], *source[1:], *target[1:])
        launch(grn_bwd_apply_kernel, (programs,))(
            gradient.tensor, source.tensor, scale, per_x, target.tensor, pixels, tiles, *strides, **config
        )
        results.append(finish(dx, target))
    if needs[1] or needs[2]:
        results += parameter_gradients(parameters, (weight, bias), needs[1:])
    return results
