"""The bottleneck as two matmul kernels with everything else in their prologues and epilogues, for any C.

expand:   h = act(norm(x) W1^T + b1)                             reads 2C, writes 8C bytes per pixel (16-bit elements)
project:  out = residual + s * gamma * (GRN?(h) W2^T + b2)       reads 8C + 2C, writes 2C

`expand` first loops over its rows once to compute their statistics, then normalises them when it reads them for the
matmul: LayerNorm needs no launch and no normalised copy. Its folded form multiplies the rows as they are by
W1 * weight (mlp_weights.py), and takes the statistics from the tiles that the matmul reads anyway:

    u = rstd * (x (W1 * weight)^T - mean * colsum) + (b1 + W1 bias),    colsum: of W1 * weight, rounded

With the sums of the rounded weights the mean cancels exactly: |mean| / std may be 100.

For ConvNeXt V2 `expand` also writes the sums of h^2 of every
tile (a tile is within one sample), and `project` applies the response when it reads h.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.activations import activate
from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.kernels.mlp_tiles import (
    described,
    grouped,
    load_transposed,
    load_vector,
    program_tile,
    store_output,
)
from convnext_kernels.backends.triton.kernels.pixels import offsets


@triton.jit
def moments(total, squares, first, eps, C: tl.constexpr, NORM: tl.constexpr):
    """(mean, rstd) of rows from the sums of d and d^2, with d = x - first; for RMSNorm d = x."""
    if NORM == "rms":
        mean = tl.zeros_like(first)
        rstd = tl.rsqrt(squares / C + eps)
    else:
        deviation = total / C
        variance = squares / C - deviation * deviation
        variance = tl.where(variance < 0, 0.0, variance)
        if NORM == "layer":
            mean = first + deviation
            rstd = tl.rsqrt(variance + eps)
        else:
            mean = tl.zeros_like(first)
            rstd = tl.rsqrt(variance * (C / (C - 1)) + eps)
    return mean, rstd


@triton.jit
def row_statistics(
    x_ptr,
    n,
    p,
    inside,
    stride_n,
    stride_p,
    stride_c,
    eps,
    C: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
):
    """What is subtracted from rows that are too long for registers, and their rstd, in one loop.

    It sums the differences from the row's first element, which is within a few standard deviations of the mean: so the
    variance loses no digits for any |mean| / std. RMSNorm needs the sum of squares itself.
    """
    first = tl.load(x_ptr + n.to(tl.int64) * stride_n + p.to(tl.int64) * stride_p, mask=inside, other=0.0)
    first = first.to(tl.float32)
    total = tl.zeros((BM, BK), dtype=tl.float32)
    squares = tl.zeros((BM, BK), dtype=tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        where = x_ptr + offsets(n, p, c, stride_n, stride_p, stride_c)
        mask = inside[:, None] & (c < C)[None, :]
        d = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        if NORM != "rms":
            d = tl.where(mask, d - first[:, None], 0.0)
        total += d
        squares += d * d
    return moments(tl.sum(total, axis=1), tl.sum(squares, axis=1), first, eps, C, NORM)


@triton.jit
def store_hidden(
    u,
    h_ptr,
    hidden_ptr,
    sums_ptr,
    n,
    p,
    tile,
    hid,
    inside,
    pixels,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store act(u), u for the gradient, and V2's sums of squares over the tile, for a tile (pixels p, columns hid)."""
    compute: tl.constexpr = h_ptr.dtype.element_ty
    held = hid < HIDDEN
    where = (n.to(tl.int64) * pixels + p)[:, None] * HIDDEN + hid[None, :]
    mask = inside[:, None] & held[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + where, u.to(compute), mask=mask)
    h = activate(u, ACTIVATION).to(compute)
    tl.store(h_ptr + where, h, mask=mask)
    if sums_ptr is not None:
        square = h.to(tl.float32)
        square = tl.where(inside[:, None], square * square, 0.0)
        tl.store(sums_ptr + tile.to(tl.int64) * HIDDEN + hid, tl.sum(square, axis=0), mask=held)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def mlp_folded_expand_kernel(
    x_ptr,
    folded_ptr,  # (HIDDEN, C) dense: of `fold_kernel`
    columns_ptr,  # (2, HIDDEN) fp32, of `fold_kernel`
    h_ptr,  # (N * HW, HIDDEN)
    hidden_ptr,  # the same for u, or None
    sums_ptr,  # (N, tiles, HIDDEN) fp32 or None: sums of h^2 over a tile
    pixels,
    tiles,
    stride_xn,
    stride_xp,
    stride_xc,
    eps,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """`mlp_expand_kernel` with the norm's parameters folded into the weights: one walk over the rows."""
    wait_for_previous(PDL)
    compute: tl.constexpr = folded_ptr.dtype.element_ty
    whole: tl.constexpr = HIDDEN % BN == 0 and C % BK == 0
    tile, n, p, inside, hid = program_tile(pixels, tiles, HIDDEN, BM, BN, GROUP)
    held = hid < HIDDEN
    row = n.to(tl.int64) * stride_xn + p.to(tl.int64) * stride_xp
    first = tl.load(x_ptr + row, mask=inside, other=0.0).to(compute).to(tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    squares = tl.zeros((BM,), dtype=tl.float32)
    u = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        mask = inside[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=mask, other=0.0).to(compute)
        d = x.to(tl.float32)
        if NORM != "rms":
            d -= first[:, None]
            if C % BK != 0:
                d = tl.where((c < C)[None, :], d, 0.0)
            total += tl.sum(d, axis=1)
        squares += tl.sum(d * d, axis=1)
        u = tl.dot(x, load_transposed(folded_ptr, hid, c, HIDDEN, C, whole), u)
    mean, rstd = moments(total, squares, first, eps, C, NORM)
    if NORM == "layer":
        u -= mean[:, None] * load_vector(columns_ptr, hid, held)[None, :]
    u = u * rstd[:, None] + load_vector(columns_ptr + HIDDEN, hid, held)[None, :]
    store_hidden(u, h_ptr, hidden_ptr, sums_ptr, n, p, tile, hid, inside, pixels, HIDDEN, ACTIVATION)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def mlp_expand_kernel(
    x_ptr,
    norm_weight_ptr,  # (C,); (N, C) if ADAPTIVE, as the bias
    norm_bias_ptr,
    w1_ptr,  # (HIDDEN, C) dense
    b1_ptr,
    h_ptr,  # (N * HW, HIDDEN)
    hidden_ptr,  # the same for u, or None
    sums_ptr,  # (N, tiles, HIDDEN) fp32 or None: sums of h^2 over a tile
    pixels,
    tiles,
    stride_xn,
    stride_xp,
    stride_xc,
    eps,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BM pixels of one sample, BN columns of the hidden."""
    wait_for_previous(PDL)
    compute: tl.constexpr = w1_ptr.dtype.element_ty
    whole: tl.constexpr = HIDDEN % BN == 0 and C % BK == 0
    tile, n, p, inside, hid = program_tile(pixels, tiles, HIDDEN, BM, BN, 1)
    held = hid < HIDDEN
    if ADAPTIVE:
        norm_weight_ptr += n.to(tl.int64) * C
        norm_bias_ptr += n.to(tl.int64) * C
    mean, rstd = row_statistics(x_ptr, n, p, inside, stride_xn, stride_xp, stride_xc, eps, C, BM, BK, NORM)
    u = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        mask = inside[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offsets(n, p, c, stride_xn, stride_xp, stride_xc), mask=mask, other=0.0)
        weight = load_vector(norm_weight_ptr, c, c < C)
        if norm_bias_ptr is None:
            z = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :]
        else:
            bias = load_vector(norm_bias_ptr, c, c < C)
            z = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        if C % BK != 0:
            z = tl.where((c < C)[None, :], z, 0.0)
        u = tl.dot(z.to(x.dtype).to(compute), load_transposed(w1_ptr, hid, c, HIDDEN, C, whole), u)
    if b1_ptr is not None:
        u += load_vector(b1_ptr, hid, held)[None, :]
    store_hidden(u, h_ptr, hidden_ptr, sums_ptr, n, p, tile, hid, inside, pixels, HIDDEN, ACTIVATION)


@triton.jit(do_not_specialize=["pixels", "tiles", "sample_pixels"])
def mlp_project_kernel(
    h_ptr,  # (N * HW, HIDDEN)
    w2_ptr,  # (C, HIDDEN) dense
    b2_ptr,
    gamma_ptr,
    grn_scale_ptr,  # (N, HIDDEN) fp32 or None
    grn_bias_ptr,
    drop_scale_ptr,
    residual_ptr,
    out_ptr,
    rounded_ptr,  # with the strides of out, or None: the residual in the dtype of the matmuls, for the gradient
    partials_ptr,  # (splits, N * HW, C) fp32: sums over a part of the hidden, and nothing else; or None
    pixels,
    tiles,
    sample_pixels,
    stride_rn,
    stride_rp,
    stride_rc,
    stride_on,
    stride_op,
    stride_oc,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BM pixels of one sample, BN channels; of SPLIT programs each sums a part of the hidden.

    With TMA 1 it loads both operands through descriptors, with 2 by warps that do nothing else. Rows of the next sample
    may then be in a tile's end: they are not stored.
    """
    wait_for_previous(PDL)
    whole: tl.constexpr = C % BN == 0 and HIDDEN % BK == 0
    columns: tl.constexpr = (C + BN - 1) // BN
    PART: tl.constexpr = ((HIDDEN + BK * SPLIT - 1) // (BK * SPLIT)) * BK
    _, n, p, inside, c = program_tile(pixels, tiles, C, BM, BN, GROUP)
    row = (n.to(tl.int64) * pixels + p)[:, None] * HIDDEN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    begin = 0
    end = HIDDEN
    if SPLIT > 1:
        begin = tl.program_id(1) * PART
        end = tl.minimum(begin + PART, HIDDEN)
    samples = tl.num_programs(0) // (columns * tiles)
    if TMA > 0:
        tile, column = grouped(columns, GROUP)
        tile_row = n * pixels + (tile % tiles) * BM
        h_rows = described(h_ptr, samples * pixels, HIDDEN, BM, BK)
        w_rows = described(w2_ptr, C, HIDDEN, BN, BK)
    for start in tl.range(begin, end, BK, warp_specialize=TMA == 2):
        hid = start + tl.arange(0, BK)
        held = hid < HIDDEN
        if TMA > 0:
            h = h_rows.load([tile_row, start])
            w = w_rows.load([column * BN, start]).T
        else:
            h = tl.load(h_ptr + row + hid[None, :], mask=inside[:, None] & held[None, :], other=0.0)
            w = load_transposed(w2_ptr, c, hid, C, HIDDEN, whole)
        if grn_scale_ptr is not None:
            scale = tl.load(grn_scale_ptr + n.to(tl.int64) * HIDDEN + hid, mask=held, other=0.0)
            h = (h.to(tl.float32) * scale[None, :] + load_vector(grn_bias_ptr, hid, held)[None, :]).to(h.dtype)
        acc = tl.dot(h, w, acc)
    if partials_ptr is not None:
        place = (tl.program_id(1) * samples + n).to(tl.int64) * pixels + p
        tl.store(partials_ptr + place[:, None] * C + c[None, :], acc, mask=inside[:, None] & (c < C)[None, :])
    else:
        parameters = (b2_ptr, gamma_ptr, drop_scale_ptr)
        residual = (residual_ptr, stride_rn, stride_rp, stride_rc)
        out = (out_ptr, rounded_ptr, stride_on, stride_op, stride_oc)
        store_output(acc, parameters, residual, out, n, p, c, inside, sample_pixels, C)
