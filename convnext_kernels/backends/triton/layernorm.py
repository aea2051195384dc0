"""LayerNorm over the channels of (N, C, H, W): y = (x - mean_c) * rstd_c * weight + bias, biased variance.

Also RMSNorm and SimpleNorm (`variants.py`), which have no bias: NORM.

With xhat = (x - mean) * rstd and g = dy * weight:

    dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)),    dweight = sum dy * xhat,    dbias = sum dy

The others have xhat = x * rstd and no mean_c(g); SimpleNorm has the slope (x - mean) * rstd instead of the first xhat
and divides its sum by C - 1.

Bytes per pixel with 16-bit elements: forward 4C (x once, y once), backward 6C (dy and x once, dx once) plus 8C for
each of at most a few hundred programs' partial sums. A pixel's channels stay in registers, so the statistics need no
second read of x; the backward pass does not read statistics but computes them again from x.

Values are rounded as in PyTorch under autocast: parameters, the result and the incoming gradient to x's dtype; y may
then be stored in another dtype. Everything between is fp32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.backends.gpu import parameters
from convnext_kernels.backends.gpu.layout import Rows, extent, finish, output_rows, rows, vector
from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.kernels import layernorm_wide as wide
from convnext_kernels.backends.triton.kernels.pixels import COUNTS, offsets, patch_order
from convnext_kernels.backends.triton.launch import launch, prepared
from convnext_kernels.backends.triton.reduce import sum_partials
from convnext_kernels.calls import NormCall
from convnext_kernels.variants import LAYER

MAX_BLOCK_C = 8192  # more channels do not fit in registers: layernorm_wide.py
MAX_BLOCK_C_SCATTERED = 4096  # the same for the backward pass of NCHW, which keeps an address for every element
# At least so many pixels share one row of partial sums for the parameters' gradients. Writing and reading a row takes
# 16C bytes, beside the 96C bytes of 16 pixels, and there are few rows to add.
SHARED_PIXELS = 16

# Sum (programs, 2, C) partial gradients of (weight, bias) and return those that are needed
parameter_gradients = functools.partial(parameters.gradients, sum_partials)


@triton.jit
def centre(x, inside, C: tl.constexpr):
    """Return (x - mean, variance) of rows in registers, which are 0 where not `inside`.

    Two passes, so that a mean far larger than the deviation costs no digits. The mean of the deviations corrects the
    mean: C equal values give exactly 0 even if their mean is rounded.
    """
    mean = tl.sum(x, axis=1) / C
    d = tl.where(inside, x - mean[:, None], 0.0)
    correction = tl.sum(d, axis=1) / C
    variance = tl.sum(d * d, axis=1) / C - correction * correction
    # Not tl.maximum: NaN must stay NaN
    return d - correction[:, None], tl.where(variance < 0, 0.0, variance)


@triton.jit
def normalise(x, inside, eps, C: tl.constexpr, NORM: tl.constexpr):
    """Return (xhat / rstd, slope / rstd, rstd) of rows in registers."""
    if NORM == "rms":
        numerator = x
        centred = x
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    else:
        centred, variance = centre(x, inside, C)
        if NORM == "layer":
            numerator = centred
            rstd = tl.rsqrt(variance + eps)
        else:
            numerator = x
            rstd = tl.rsqrt(variance * (C / (C - 1)) + eps)
    return numerator, centred, rstd


@triton.jit(do_not_specialize=COUNTS)
def layernorm_fwd_kernel(
    x_ptr,
    weight_ptr,  # (C,); (N, C) if ADAPTIVE, as the bias
    bias_ptr,
    y_ptr,
    pixels,  # of one sample
    tiles,  # of one sample
    height,
    width,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_yn,
    stride_yp,
    stride_yc,
    eps,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH: tl.constexpr,
    NORM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    """One program: BLOCK_P pixels of one sample, all their channels."""
    n = tl.program_id(0) // tiles
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=inside, other=0.0)
    numerator, _, rstd = normalise(x.to(tl.float32), inside, eps, C, NORM)
    if ADAPTIVE:
        weight_ptr += n.to(tl.int64) * C
        bias_ptr += n.to(tl.int64) * C
    y = numerator * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    q = p
    if PATCH > 1:
        q, whole = patch_order(p, height, width, PATCH)
        inside &= whole[:, None]
    y = y.to(x.dtype).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets(n, q, c, stride_yn, stride_yp, stride_yc), y, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def layernorm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,  # None: not needed
    partials_ptr,  # (programs, 2, C) fp32: dweight, dbias. None: not needed
    pixels,  # of one sample
    tiles,  # of one sample
    total,  # tiles of all samples
    height,
    width,
    stride_dyn,
    stride_dyp,
    stride_dyc,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_dxn,
    stride_dxp,
    stride_dxc,
    eps,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PATCH: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program: every num_programs-th tile of BLOCK_P pixels, and the sums over these for the parameters."""
    c = tl.arange(0, BLOCK_C)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if partials_ptr is not None:
        # Summed over pixels only at the end, because that is a sum over threads and warps.
        dweight = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        dbias = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        n = tile // tiles
        p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        q, held = p, inside
        if PATCH > 1:
            q, whole = patch_order(p, height, width, PATCH)
            held = inside & whole[:, None]  # pixels outside of whole patches have no gradient
        x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=inside, other=0.0)
        dy = tl.load(dy_ptr + offsets(n, q, c, stride_dyn, stride_dyp, stride_dyc), mask=held, other=0.0)
        dy = dy.to(x.dtype).to(tl.float32)
        numerator, centred, rstd = normalise(x.to(tl.float32), inside, eps, C, NORM)
        # 0 for rows past the end: with eps = 0 it would be infinite, and the sums would get 0 * inf
        rstd = tl.where(p < pixels, rstd, 0.0)[:, None]
        xhat = numerator * rstd
        if partials_ptr is not None:
            dweight += dy * xhat
            dbias += dy
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g *= weight
            if NORM == "layer":
                along_mean = (tl.sum(g, axis=1) / C)[:, None]
                along_xhat = (tl.sum(g * xhat, axis=1) / C)[:, None]
                dx = rstd * (g - along_mean - xhat * along_xhat)
            else:
                along_xhat = (tl.sum(g * xhat, axis=1) / (C - 1 if NORM == "simple" else C))[:, None]
                dx = rstd * (g - centred * rstd * along_xhat)
            where = offsets(n, p, c, stride_dxn, stride_dxp, stride_dxc)
            tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if partials_ptr is not None:
        row = partials_ptr + tl.program_id(0) * (2 * C)
        tl.store(row + c, tl.sum(dweight, axis=0), mask=c < C)
        tl.store(row + C + c, tl.sum(dbias, axis=0), mask=c < C)


def tile(
    channels: int, pixels_inside: bool, element_size: int, elements: int, most: int = 8192
) -> tuple[int, int, int]:
    """Return (BLOCK_P, BLOCK_C, num_warps) for tiles of about `elements` elements.

    In NHWC a thread loads 16 bytes of neighbouring channels, so any number of pixels will do. NCHW needs a whole
    32-byte sector of pixels, or as much of it as `most` elements allow.
    """
    block_c = triton.next_power_of_2(channels)
    block_p = max(1, elements // block_c)
    if pixels_inside:
        block_p = max(block_p, min(32 // element_size, most // block_c))
    return block_p, block_c, max(4, min(16, block_p * block_c // 512))


def backward_tile(
    channels: int, pixels_inside: bool, element_size: int, patch: int, pixels: int, programs: int
) -> tuple[int, int, int]:
    """As `tile`, for the backward pass of `pixels` pixels in all, which `programs` programs may share."""
    # NCHW needs an address for every element: more than 16 per thread spill, with long rows or patches even fewer.
    most = 4096 if patch > 1 or channels > 1024 else 8192
    found = tile(channels, pixels_inside, element_size, 4096, most)
    if patch == 1 and not pixels_inside and found[0] < SHARED_PIXELS and pixels < found[0] * programs:
        # There are fewer tiles than programs: the time is what one program needs for its SHARED_PIXELS.
        found = tile(channels, pixels_inside, element_size, 8192)
    return found[0], found[1], max(8, found[2])


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Rows,
    *,
    patch: int = 1,
    norm: str = LAYER,
) -> None:
    """The norm of (N, C, H, W) into `out` (from `output_rows`, `rows` or `patch_rows`), in out's dtype.

    weight and bias have C elements, or are (N, C): those of each sample.
    """
    source = rows(x)
    channels, height, width = x.shape[1:]
    adaptive = weight is not None and weight.numel() != channels
    samples, pixels = extent(source, out, merge=patch == 1 and not adaptive)
    if channels > MAX_BLOCK_C:
        block_p, kernel, config = 1, wide.layernorm_fwd_wide_kernel, {"BLOCK_C": 2048, "num_warps": 8}
    else:
        block_p, block_c, warps = tile(channels, source.stride_p == 1, x.element_size(), 2048)
        kernel, config = layernorm_fwd_kernel, {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    tiles = triton.cdiv(pixels, block_p)
    config |= {"C": channels, "PATCH": patch, "NORM": norm, "ADAPTIVE": adaptive, "enable_fp_fusion": True}
    tensors = source.tensor, vector(weight), vector(bias), out.tensor
    sizes = pixels, tiles, height, width, *source[1:], *out[1:], eps
    launch(kernel, (samples * tiles,))(*tensors, *sizes, **config)


@prepared
def forward(call: NormCall) -> Tensor:
    """Normalise every pixel over its channels; the result has x's dtype and strides."""
    x, weight, bias, eps, norm, _ = call
    out, written = output_rows(x)
    normalize(x, weight, bias, eps, written, norm=norm)
    return finish(out, written)


def gradients(
    dy: Rows,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
    patch: int = 1,
    norm: str = LAYER,
) -> list[Tensor]:
    """As `backward`, for a gradient given as rows: in the order of pixels, or of patches (`patch_rows`)."""
    source = rows(x)
    channels, height, width = x.shape[1:]
    dx, target = output_rows(x) if needs[0] else (None, source)
    samples, pixels = extent(source, dy, target, merge=patch == 1)
    # Two CTAs of 8 warps per multiprocessor: 32 KB of loads in flight on each, and few rows of partial sums.
    programs = 2 * device.gpu().sms
    summed = needs[1] or needs[2]
    scattered = source.stride_p == 1 != source.stride_c
    if channels > (MAX_BLOCK_C_SCATTERED if scattered else MAX_BLOCK_C):
        block_p, kernel = 1, wide.layernorm_bwd_wide_kernel
        config = {"BLOCK_C": 1024 if scattered else 2048, "num_warps": 8}
    else:
        block_p, block_c, warps = backward_tile(
            channels, source.stride_p == 1, x.element_size(), patch, samples * pixels, programs
        )
        kernel, config = layernorm_bwd_kernel, {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    tiles = triton.cdiv(pixels, block_p)
    programs = min(programs, samples * tiles)
    if summed:
        programs = min(programs, triton.cdiv(samples * pixels, SHARED_PIXELS))
    partials = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device) if summed else None
    config |= {"C": channels, "PATCH": patch, "NORM": norm, "enable_fp_fusion": True}
    tensors = dy.tensor, source.tensor, vector(weight), None if dx is None else target.tensor, partials
    strides = *dy[1:], *source[1:], *target[1:]
    launch(kernel, (programs,))(*tensors, pixels, tiles, samples * tiles, height, width, *strides, eps, **config)
    results = [finish(dx, target)] if needs[0] else []
    return results + parameter_gradients(partials, (weight, bias), needs[1:])


@prepared
def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; bitwise the same every time."""
    x, weight, bias, eps, norm, _ = call
    return gradients(rows(dy), x, weight, bias, eps, needs, norm=norm)
