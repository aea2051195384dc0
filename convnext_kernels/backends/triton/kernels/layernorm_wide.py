"""The kernels of layernorm.py for rows that are too long for registers: one pixel, BLOCK_C channels at a time.

x is read three times (sum, deviations, result), the second and third time from L2 if a row fits. This fallback makes
every C work; it is not fast. The arguments are those of the kernels in layernorm.py, which launches these.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.pixels import COUNTS, patch_order


@triton.jit
def load_channels(pointer, c, stride_c, C: tl.constexpr):
    """Channels c of one row as fp32, 0 past the end."""
    return tl.load(pointer + c.to(tl.int64) * stride_c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def statistics(x_row, stride_c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean, its correction and variance of one row; two passes, as in layernorm.py."""
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        acc += load_channels(x_row, start + tl.arange(0, BLOCK_C), stride_c, C)
    mean = tl.sum(acc, axis=0) / C
    left = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        d = tl.where(c < C, load_channels(x_row, c, stride_c, C) - mean, 0.0)
        left += d
        squares += d * d
    correction = tl.sum(left, axis=0) / C
    variance = tl.sum(squares, axis=0) / C - correction * correction
    return mean, correction, tl.where(variance < 0, 0.0, variance)


@triton.jit
def measure(x_row, stride_c, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr):
    """Mean, its correction and rstd of one row; RMSNorm has no mean."""
    if NORM == "rms":
        squares = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, C, BLOCK_C):
            x = load_channels(x_row, start + tl.arange(0, BLOCK_C), stride_c, C)
            squares += x * x
        mean = 0.0
        correction = 0.0
        variance = tl.sum(squares, axis=0) / C
    else:
        mean, correction, variance = statistics(x_row, stride_c, C, BLOCK_C)
        if NORM == "simple":
            variance = variance * (C / (C - 1))
    return mean, correction, tl.rsqrt(variance + eps)


@triton.jit
def normalised(x, mean, correction, rstd, NORM: tl.constexpr):
    """Xhat of some channels of a row."""
    if NORM == "layer":
        return (x - mean - correction) * rstd
    return x * rstd


@triton.jit(do_not_specialize=COUNTS)
def layernorm_fwd_wide_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    tiles,
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
    BLOCK_C: tl.constexpr,
    PATCH: tl.constexpr,
    NORM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    """One program: one pixel."""
    n = (tl.program_id(0) // pixels).to(tl.int64)
    p = tl.program_id(0) % pixels
    x_row = x_ptr + n * stride_xn + p.to(tl.int64) * stride_xp
    mean, correction, rstd = measure(x_row, stride_xc, eps, C, BLOCK_C, NORM)
    if ADAPTIVE:
        weight_ptr += n * C
        bias_ptr += n * C
    q = p
    whole = p < pixels
    if PATCH > 1:
        q, whole = patch_order(p, height, width, PATCH)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y_row = y_ptr + n * stride_yn + q.to(tl.int64) * stride_yp
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        y = normalised(load_channels(x_row, c, stride_xc, C), mean, correction, rstd, NORM)
        if weight_ptr is not None:
            y *= load_channels(weight_ptr, c, 1, C)
        if bias_ptr is not None:
            y += load_channels(bias_ptr, c, 1, C)
        inside = tl.where(whole, c < C, False)
        tl.store(y_row + c.to(tl.int64) * stride_yc, y.to(dtype).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def layernorm_bwd_wide_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partials_ptr,
    pixels,
    tiles,
    total,
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
    BLOCK_C: tl.constexpr,
    PATCH: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program: every num_programs-th pixel. Its partial sums are in memory; each thread only uses its own."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_C)
    if partials_ptr is not None:
        partials_row = partials_ptr + tl.program_id(0) * (2 * C)
        for start in range(0, C, BLOCK_C):
            c = start + lane
            tl.store(partials_row + c, tl.zeros((BLOCK_C,), tl.float32), mask=c < C)
            tl.store(partials_row + C + c, tl.zeros((BLOCK_C,), tl.float32), mask=c < C)
    for row in range(tl.program_id(0), total, tl.num_programs(0)):
        n = (row // pixels).to(tl.int64)
        p = row % pixels
        q = p
        held = (lane >= 0) & (lane < BLOCK_C)
        if PATCH > 1:
            q, whole = patch_order(p, height, width, PATCH)
            held = tl.where(whole, held, False)
        x_row = x_ptr + n * stride_xn + p.to(tl.int64) * stride_xp
        dy_row = dy_ptr + n * stride_dyn + q.to(tl.int64) * stride_dyp
        mean, correction, rstd = measure(x_row, stride_xc, eps, C, BLOCK_C, NORM)
        along_mean = tl.zeros((BLOCK_C,), tl.float32)
        along_xhat = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + lane
            xhat = normalised(load_channels(x_row, c, stride_xc, C), mean, correction, rstd, NORM)
            dy = tl.load(dy_row + c.to(tl.int64) * stride_dyc, mask=(c < C) & held, other=0.0)
            dy = dy.to(dtype).to(tl.float32)
            if partials_ptr is not None:
                dweight = partials_row + c
                tl.store(dweight, tl.load(dweight, mask=c < C, other=0.0) + dy * xhat, mask=c < C)
                tl.store(dweight + C, tl.load(dweight + C, mask=c < C, other=0.0) + dy, mask=c < C)
            if weight_ptr is not None:
                dy *= load_channels(weight_ptr, c, 1, C)
            along_mean += dy
            along_xhat += dy * xhat
        if dx_ptr is not None:
            mean_g_xhat = tl.sum(along_xhat, axis=0) / (C - 1 if NORM == "simple" else C)
            mean_g = tl.sum(along_mean, axis=0) / C if NORM == "layer" else 0.0
            dx_row = dx_ptr + n * stride_dxn + p.to(tl.int64) * stride_dxp
            for start in range(0, C, BLOCK_C):
                c = start + lane
                slope = (load_channels(x_row, c, stride_xc, C) - mean - correction) * rstd
                g = tl.load(dy_row + c.to(tl.int64) * stride_dyc, mask=(c < C) & held, other=0.0)
                g = g.to(dtype).to(tl.float32)
                if weight_ptr is not None:
                    g *= load_channels(weight_ptr, c, 1, C)
                dx = rstd * (g - mean_g - slope * mean_g_xhat)
                tl.store(dx_row + c.to(tl.int64) * stride_dxc, dx.to(dx_ptr.dtype.element_ty), mask=c < C)
