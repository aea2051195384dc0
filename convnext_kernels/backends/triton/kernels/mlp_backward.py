"""Gradients of the inverted bottleneck, for 16-bit matmuls.

With d = s * dout, dz = gamma * d, z = norm(x), u = z W1^T + b1:

hidden:   du = (dz W2) * act'(u), g = act(u), db1 = sum of du before it is rounded; GRN (V2) is a separate kernel
input:    dn = du W1, then LayerNorm's backward in the epilogue if one program has whole rows
weights:  dW1 = du^T z, G2 = d^T g, both split over the pixels into fp32 partial sums
finish:   dW2 = gamma * G2, dgamma = rowsum(W2 * G2) + b2 sum d, db2 = gamma sum d

The output of W2 is not needed. Every sum has a fixed order (no atomics). u is read if the forward pass kept it, else
computed again. Bytes per pixel with 16-bit elements and the hidden kept: LayerNorm 4C, hidden 10C + 16C, input 8C + 4C,
weights 10C + 10C, together 62C; eager moves about 100C. Of few channels mlp_fused_backward.py needs less.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.activations import activate, activate_and_derivative
from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.kernels.mlp_tiles import (
    described,
    grouped,
    load_matrix,
    load_pieces,
    load_transposed,
    load_vector,
    normalise_pieces,
    program_tile,
    zero_pieces,
)
from convnext_kernels.backends.triton.kernels.pixels import offsets


@triton.jit
def store_grn_sums(at, stride, u, dg, mask, held, COMPUTE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Store what GRN's gradient needs of a tile, in three rows from `at` on: the sums of h^2, dg * h and dg."""
    h = tl.where(mask, activate(u, ACTIVATION).to(COMPUTE).to(tl.float32), 0.0)
    dg = tl.where(mask, dg.to(COMPUTE).to(tl.float32), 0.0)
    tl.store(at, tl.sum(h * h, axis=0), mask=held)
    tl.store(at + stride, tl.sum(dg * h, axis=0), mask=held)
    tl.store(at + 2 * stride, tl.sum(dg, axis=0), mask=held)


@triton.jit(do_not_specialize=["pixels", "tiles", "sample_pixels"])
def mlp_hidden_gradient_kernel(
    dout_ptr,  # (N * HW, C) dense
    gamma_ptr,
    drop_scale_ptr,
    w2_ptr,
    hidden_ptr,  # (N * HW, HIDDEN): u if the forward pass kept it, else None
    z_ptr,  # (N * HW, C) dense: LN(x), read if u is computed again
    w1_ptr,
    b1_ptr,
    du_ptr,  # (N * HW, HIDDEN): du; with GRN the gradient of its result
    g_ptr,  # (N * HW, HIDDEN): g; with GRN u, or None if it was kept
    sums_ptr,  # (N, tiles, HIDDEN) fp32: sums of du over a tile; with GRN (3, N, tiles, HIDDEN), of h^2, dg * h, dg
    sums_stride,
    pixels,
    tiles,
    sample_pixels,
    GRN: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BM pixels of one sample, BN columns of the hidden."""
    wait_for_previous(PDL)
    compute: tl.constexpr = w2_ptr.dtype.element_ty
    whole: tl.constexpr = C % BK == 0 and HIDDEN % BN == 0
    tile, n, p, inside, hid = program_tile(pixels, tiles, HIDDEN, BM, BN, 1)
    held = hid < HIDDEN
    row = n.to(tl.int64) * pixels + p
    scale = tl.full((BM,), 1.0, dtype=tl.float32)
    if drop_scale_ptr is not None:
        scale = load_vector(drop_scale_ptr, n + p // sample_pixels, inside)
    dg = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, C, BK):
        c = start + tl.arange(0, BK)
        mask = inside[:, None] & (c < C)[None, :]
        dz = tl.load(dout_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0)
        if drop_scale_ptr is not None:
            dz = dz.to(tl.float32) * scale[:, None]
        if gamma_ptr is not None:
            dz = dz.to(tl.float32) * load_vector(gamma_ptr, c, c < C)[None, :]
        dg = tl.dot(dz.to(compute), load_matrix(w2_ptr, c, hid, C, HIDDEN, whole), dg)
    where = row[:, None] * HIDDEN + hid[None, :]
    mask = inside[:, None] & held[None, :]
    if hidden_ptr is not None:
        u = tl.load(hidden_ptr + where, mask=mask, other=0.0).to(tl.float32)
    else:
        u = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, C, BK):
            c = start + tl.arange(0, BK)
            z = tl.load(z_ptr + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            u = tl.dot(z, load_transposed(w1_ptr, hid, c, HIDDEN, C, whole), u)
        if b1_ptr is not None:
            u += load_vector(b1_ptr, hid, held)[None, :]
    at = sums_ptr + tile.to(tl.int64) * HIDDEN + hid
    if not GRN:
        g, derivative = activate_and_derivative(u, ACTIVATION)
        du = dg * derivative
        tl.store(du_ptr + where, du.to(compute), mask=mask)
        tl.store(g_ptr + where, g.to(compute), mask=mask)
        tl.store(at, tl.sum(tl.where(mask, du, 0.0), axis=0), mask=held)
    else:
        tl.store(du_ptr + where, dg.to(compute), mask=mask)
        if g_ptr is not None:
            tl.store(g_ptr + where, u.to(compute), mask=mask)
        store_grn_sums(at, sums_stride, u, dg, mask, held, compute, ACTIVATION)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def grn_hidden_gradient_kernel(
    dg_ptr,  # (N * HW, HIDDEN): in, the gradient of GRN's result; out, du
    u_ptr,
    g_ptr,  # out: GRN's result; may be u_ptr
    grn_scale_ptr,  # (N, HIDDEN) fp32
    grn_bias_ptr,
    per_h_ptr,  # (N, HIDDEN) fp32: the gradient of h through the norm, divided by h
    sums_ptr,  # (N, tiles, HIDDEN) fp32: sums of du over a tile
    pixels,
    tiles,
    HIDDEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """With h = act(u): du = (dg * scale + h * per_h) * act'(u), g = h * scale + bias."""
    columns: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) // columns
    n = tile // tiles
    p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    hid = (tl.program_id(0) % columns) * BLOCK_H + tl.arange(0, BLOCK_H)
    held = hid < HIDDEN
    mask = (p < pixels)[:, None] & held[None, :]
    where = (n.to(tl.int64) * pixels + p)[:, None] * HIDDEN + hid[None, :]
    u = tl.load(u_ptr + where, mask=mask, other=0.0).to(tl.float32)
    h, derivative = activate_and_derivative(u, ACTIVATION)
    h = h.to(u_ptr.dtype.element_ty).to(tl.float32)
    at = n.to(tl.int64) * HIDDEN + hid
    scale = tl.load(grn_scale_ptr + at, mask=held, other=0.0)[None, :]
    per_h = tl.load(per_h_ptr + at, mask=held, other=0.0)[None, :]
    dg = tl.load(dg_ptr + where, mask=mask, other=0.0).to(tl.float32)
    du = (dg * scale + h * per_h) * derivative
    g = h * scale + load_vector(grn_bias_ptr, hid, held)[None, :]
    tl.store(dg_ptr + where, du.to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tile.to(tl.int64) * HIDDEN + hid, tl.sum(tl.where(mask, du, 0.0), axis=0), mask=held)
    tl.store(g_ptr + where, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_input_gradient(
    dn,
    x,
    norm_weight_ptr,
    dx,
    partials_ptr,
    n,
    p,
    inside,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
    NORM: tl.constexpr,
):
    """The norm's backward for a tile of whole rows: dx and the program's sums for dweight and dbias, from dn.

    x, dx: their pointer and three strides.
    """
    x_ptr, stride_xn, stride_xp, stride_xc = x
    dx_ptr, stride_dxn, stride_dxp, stride_dxc = dx
    dtype = x_ptr.dtype.element_ty
    rows = load_pieces(x_ptr, n, p, inside, stride_xn, stride_xp, stride_xc, C, BC, PIECES)
    xhat, slope, rstd = normalise_pieces(rows, eps, C, BC, PIECES, NORM)
    along_mean = tl.zeros((p.shape[0],), dtype=tl.float32)
    along_xhat = tl.zeros((p.shape[0],), dtype=tl.float32)
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        # dn is 0 for c >= C and for rows past the end, because W1 and du are loaded as 0 there
        dy = dn[j].to(dtype).to(tl.float32)
        if partials_ptr is not None:
            at = partials_ptr + tl.program_id(0).to(tl.int64) * (2 * C) + c
            held = tl.where(inside[:, None], dy * xhat[j], 0.0)  # rstd may be infinite past the end
            tl.store(at, tl.sum(held, axis=0), mask=c < C)
            tl.store(at + C, tl.sum(dy, axis=0), mask=c < C)
        g = dy * load_vector(norm_weight_ptr, c, c < C)[None, :]
        if NORM == "layer":
            along_mean += tl.sum(g, axis=1)
        along_xhat += tl.sum(g * xhat[j], axis=1)
    along_mean = along_mean / C
    along_xhat = along_xhat / (C - 1 if NORM == "simple" else C)
    if dx_ptr is not None:
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            weight = load_vector(norm_weight_ptr, c, c < C)
            g = dn[j].to(dtype).to(tl.float32) * weight[None, :]
            gradient = rstd[:, None] * (g - along_mean[:, None] - slope[j] * along_xhat[:, None])
            where = offsets(n, p, c, stride_dxn, stride_dxp, stride_dxc)
            tl.store(dx_ptr + where, gradient.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["pixels", "tiles"])
def mlp_input_gradient_kernel(
    du_ptr,  # (N * HW, HIDDEN)
    w1_ptr,
    x_ptr,  # None: dn is stored, without LayerNorm's backward
    norm_weight_ptr,
    dx_ptr,
    partials_ptr,  # (programs, 2, C) fp32 or None: the norm's dweight, dbias
    pixels,
    tiles,
    stride_xn,
    stride_xp,
    stride_xc,
    stride_dxn,
    stride_dxp,
    stride_dxc,
    eps,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute dn = du W1 and the norm's backward. One program: BM pixels of one sample, PIECES * BC channels.

    If x is given, a program has whole rows, so that the row sums of LayerNorm's backward need no other program.
    """
    wait_for_previous(PDL)
    whole: tl.constexpr = HIDDEN % BK == 0 and C % (BC * PIECES) == 0
    columns: tl.constexpr = (C + BC * PIECES - 1) // (BC * PIECES)
    tile, column = grouped(columns, 1)
    first = column * (BC * PIECES)
    n = tile // tiles
    p = (tile % tiles) * BM + tl.arange(0, BM)
    inside = p < pixels
    row = (n.to(tl.int64) * pixels + p)[:, None] * HIDDEN
    dn = zero_pieces(BM, BC, PIECES)
    for start in range(0, HIDDEN, BK):
        hid = start + tl.arange(0, BK)
        du = tl.load(du_ptr + row + hid[None, :], mask=inside[:, None] & (hid < HIDDEN)[None, :], other=0.0)
        products = ()
        for j in tl.static_range(PIECES):
            c = first + j * BC + tl.arange(0, BC)
            products = products + (tl.dot(du, load_matrix(w1_ptr, hid, c, HIDDEN, C, whole), dn[j]),)
        dn = products
    if x_ptr is None:
        for j in tl.static_range(PIECES):
            c = first + j * BC + tl.arange(0, BC)
            where = offsets(n, p, c, stride_dxn, stride_dxp, stride_dxc)
            tl.store(dx_ptr + where, dn[j].to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
    else:
        x_rows = (x_ptr, stride_xn, stride_xp, stride_xc)
        dx_rows = (dx_ptr, stride_dxn, stride_dxp, stride_dxc)
        store_input_gradient(dn, x_rows, norm_weight_ptr, dx_rows, partials_ptr, n, p, inside, eps, C, BC, PIECES, NORM)


@triton.jit(do_not_specialize=["pixels", "chunk", "sample_pixels"])
def mlp_weight_gradient_kernel(
    a_ptr,  # (pixels, M) dense
    b_ptr,  # (pixels, N) dense, in the dtype of the matmuls
    drop_scale_ptr,  # scales the rows of a, or None
    partials_ptr,  # (splits, M, N) fp32
    sums_ptr,  # (splits, M) fp32 or None: column sums of a
    pixels,
    chunk,  # pixels of one split, a multiple of BP
    sample_pixels,
    M: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """partials[split] = a^T b over the split's pixels; one program: a (BM, BN) tile of it."""
    wait_for_previous(PDL)
    compute: tl.constexpr = b_ptr.dtype.element_ty
    columns: tl.constexpr = (N + BN - 1) // BN
    m = (tl.program_id(0) // columns) * BM + tl.arange(0, BM)
    j = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, pixels)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if sums_ptr is not None:
        total = tl.zeros((BM, BP), dtype=tl.float32)
    if TMA > 0:  # a chunk is a multiple of BP: what is read past its end is past the end of all rows
        a_rows = described(a_ptr, pixels, M, BP, BM)
        b_rows = described(b_ptr, pixels, N, BP, BN)
    for start in range(begin, end, BP):
        p = start + tl.arange(0, BP)
        row = p.to(tl.int64)
        inside = p < end
        if TMA > 0:
            a = a_rows.load([start, tl.program_id(0) // columns * BM]).T
            b = b_rows.load([start, tl.program_id(0) % columns * BN])
        else:
            a = tl.load(a_ptr + row[None, :] * M + m[:, None], mask=inside[None, :] & (m < M)[:, None], other=0.0)
            b = tl.load(b_ptr + row[:, None] * N + j[None, :], mask=inside[:, None] & (j < N)[None, :], other=0.0)
        if drop_scale_ptr is not None:
            a = a.to(tl.float32) * load_vector(drop_scale_ptr, p // sample_pixels, inside)[None, :]
        if sums_ptr is not None:
            total += a.to(tl.float32)
        acc = tl.dot(a.to(compute), b, acc)
    where = (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + j[None, :]
    tl.store(partials_ptr + where, acc, mask=(m < M)[:, None] & (j < N)[None, :])
    if sums_ptr is not None:
        # Every column tile has the same sum; the first one stores it.
        keep = tl.where(tl.program_id(0) % columns == 0, m < M, False)
        tl.store(sums_ptr + tl.program_id(1) * M + m, tl.sum(total, axis=1), mask=keep)


@triton.jit(do_not_specialize=["splits"])
def projection_gradient_kernel(
    partials_ptr,  # (splits, C, HIDDEN) fp32: G2
    sums_ptr,  # (splits, C) fp32: sum d
    w2_ptr,
    b2_ptr,
    gamma_ptr,
    dw2_ptr,  # (C, HIDDEN)
    db2_ptr,
    dgamma_ptr,  # None without gamma
    splits,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """dW2 = gamma * G2, db2 = gamma * sum d, dgamma = rowsum(W2 * G2) + b2 * sum d; one program: one row of W2."""
    wait_for_previous(PDL)
    c = tl.program_id(0)
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c).to(tl.float32)
    d = 0.0
    for split in range(splits):
        d += tl.load(sums_ptr + split * C + c)
    along = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        hid = start + tl.arange(0, BLOCK_H)
        held = hid < HIDDEN
        g2 = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for split in range(splits):
            at = (tl.cast(split, tl.int64) * C + c) * HIDDEN + hid
            g2 += tl.load(partials_ptr + at, mask=held, other=0.0)
        tl.store(dw2_ptr + c * HIDDEN + hid, (g2 * gamma).to(dw2_ptr.dtype.element_ty), mask=held)
        if dgamma_ptr is not None:
            along += g2 * load_vector(w2_ptr + c * HIDDEN, hid, held)
    if db2_ptr is not None:
        tl.store(db2_ptr + c, (d * gamma).to(db2_ptr.dtype.element_ty))
    if dgamma_ptr is not None:
        dgamma = tl.sum(along, axis=0)
        if b2_ptr is not None:
            dgamma += d * tl.load(b2_ptr + c).to(tl.float32)
        tl.store(dgamma_ptr + c, dgamma.to(dgamma_ptr.dtype.element_ty))
