"""Gradients of the inverted bottleneck with the hidden on chip, for 16-bit matmuls and few channels.

With the names of mlp_backward.py. One kernel computes everything of a pixel, from x and dout:

    z = norm(x), u = z W1^T + b1, dg = (s gamma dout) W2, du = dg * act'(u), dn = du W1, then the norm's backward

It loops over the hidden in chunks of BH columns, as attention's backward does over its keys. The weight gradients need
z, du and g = act(u) besides. There are two plans:

fused       it stores z, du and g, which `mlp_weight_gradient_kernel` or the library reads
recomputed  it stores z; `mlp_recomputed_weight_gradient_kernel` computes du and g of its columns once more

Bytes per pixel with 16-bit elements, and products of C by 4C for each pixel:

                                 norm  hidden  input  data  weights  together  products
separate kernels, hidden kept    4C    26C     12C    -     20C      62C       4
separate, hidden computed again  4C    20C     12C    -     20C      56C       5
fused                            -     -       -      24C   20C      44C       5
recomputed                       -     -       -      8C    4C       12C       7

V2 runs the data kernel twice, the first time only for GRN's sums: 4C more; GRN is not served by `recomputed`, whose
programs go through several samples.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.activations import activate_and_derivative
from convnext_kernels.backends.triton.kernels.mlp_backward import store_grn_sums, store_input_gradient
from convnext_kernels.backends.triton.kernels.mlp_tiles import (
    load_matrix,
    load_pieces,
    load_transposed,
    load_vector,
    normed_pieces,
    zero_pieces,
)


@triton.jit
def scaled_gradient_pieces(
    dout_ptr,
    gamma_ptr,
    drop_scale_ptr,
    row,
    n,
    inside,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Load s * gamma * dout, rows of a tile, in COMPUTE."""
    pieces = ()
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        mask = inside[:, None] & (c < C)[None, :]
        d = tl.load(dout_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0)
        if drop_scale_ptr is not None:
            d = d.to(tl.float32) * load_vector(drop_scale_ptr, n, inside)[:, None]
        if gamma_ptr is not None:
            d = d.to(tl.float32) * load_vector(gamma_ptr, c, c < C)[None, :]
        pieces = pieces + (d.to(COMPUTE),)
    return pieces


@triton.jit
def store_pieces(ptr, pieces, row, inside, C: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr):
    """Store rows of a tile in a dense (rows, C)."""
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        tl.store(ptr + row[:, None] * C + c[None, :], pieces[j], mask=inside[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["pixels", "tiles", "sample_pixels"])
def mlp_data_gradient_kernel(
    dout_ptr,  # (N * HW, C) dense
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_ptr,  # (HIDDEN, C) dense
    b1_ptr,
    w2_ptr,  # (C, HIDDEN) dense
    gamma_ptr,
    drop_scale_ptr,
    grn_scale_ptr,  # (N, HIDDEN) fp32 or None: as in `grn_hidden_gradient_kernel`
    grn_bias_ptr,
    per_h_ptr,
    z_ptr,  # (N * HW, C) or None: norm(x)
    du_ptr,  # (N * HW, HIDDEN) or None
    g_ptr,  # (N * HW, HIDDEN) or None
    sums_ptr,  # (N, tiles, HIDDEN) fp32 or None: sums of du over a tile; of V2's first pass (3, N, tiles, HIDDEN)
    sums_stride,
    dx_ptr,
    partials_ptr,  # (programs, 2, C) fp32 or None: the norm's dweight, dbias
    pixels,
    tiles,
    sample_pixels,
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
    BH: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMS_ONLY: tl.constexpr,
):
    """One program: BM pixels of one sample.

    V2 launches it twice: with SUMS_ONLY for the sums of h^2, dg * h and dg, then with what follows from them.
    """
    compute: tl.constexpr = w1_ptr.dtype.element_ty
    whole: tl.constexpr = HIDDEN % BH == 0 and PIECES * BC == C
    n = tl.program_id(0) // tiles
    p = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    inside = p < pixels
    row = n.to(tl.int64) * pixels + p
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = load_pieces(x_ptr, n, p, inside, stride_xn, stride_xp, stride_xc, C, BC, PIECES)
    z = normed_pieces(x, norm_weight_ptr, norm_bias_ptr, eps, dtype, compute, C, BC, PIECES, NORM)
    dz = scaled_gradient_pieces(
        dout_ptr, gamma_ptr, drop_scale_ptr, row, n + p // sample_pixels, inside, compute, C, BC, PIECES
    )
    if z_ptr is not None:
        store_pieces(z_ptr, z, row, inside, C, BC, PIECES)
    dn = zero_pieces(BM, BC, PIECES)
    for start in range(0, HIDDEN, BH):
        hid = start + tl.arange(0, BH)
        held = hid < HIDDEN
        u = tl.zeros((BM, BH), dtype=tl.float32)
        dg = tl.zeros((BM, BH), dtype=tl.float32)
        w1 = ()
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            weights = load_matrix(w1_ptr, hid, c, HIDDEN, C, whole)
            w1 = w1 + (weights,)
            u = tl.dot(z[j], weights.T, u)
            dg = tl.dot(dz[j], load_matrix(w2_ptr, c, hid, C, HIDDEN, whole), dg)
        if b1_ptr is not None:
            u += load_vector(b1_ptr, hid, held)[None, :]
        where = row[:, None] * HIDDEN + hid[None, :]
        mask = inside[:, None] & held[None, :]
        if sums_ptr is not None:
            at = sums_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + hid
        if SUMS_ONLY:
            store_grn_sums(at, sums_stride, u, dg, mask, held, compute, ACTIVATION)
        else:
            g, derivative = activate_and_derivative(u, ACTIVATION)
            if grn_scale_ptr is not None:
                of_sample = n.to(tl.int64) * HIDDEN + hid
                scale = tl.load(grn_scale_ptr + of_sample, mask=held, other=0.0)[None, :]
                per_h = tl.load(per_h_ptr + of_sample, mask=held, other=0.0)[None, :]
                h = g.to(compute).to(tl.float32)
                dg = dg.to(compute).to(tl.float32) * scale + h * per_h
                g = h * scale + load_vector(grn_bias_ptr, hid, held)[None, :]
            du = dg * derivative
            if grn_scale_ptr is not None:
                du = tl.where(mask, du, 0.0)  # h is not 0 past the end
            if du_ptr is not None:
                tl.store(du_ptr + where, du.to(compute), mask=mask)
                tl.store(g_ptr + where, g.to(compute), mask=mask)
            if sums_ptr is not None:
                tl.store(at, tl.sum(tl.where(mask, du, 0.0), axis=0), mask=held)
            if dx_ptr is not None or partials_ptr is not None:
                products = ()
                for j in tl.static_range(PIECES):
                    products = products + (tl.dot(du.to(compute), w1[j], dn[j]),)
                dn = products
    if dx_ptr is not None or partials_ptr is not None:
        x_rows = (x_ptr, stride_xn, stride_xp, stride_xc)
        dx_rows = (dx_ptr, stride_dxn, stride_dxp, stride_dxc)
        store_input_gradient(dn, x_rows, norm_weight_ptr, dx_rows, partials_ptr, n, p, inside, eps, C, BC, PIECES, NORM)


@triton.jit(do_not_specialize=["pixels", "chunk", "sample_pixels"])
def mlp_recomputed_weight_gradient_kernel(
    dout_ptr,  # (pixels, C) dense
    z_ptr,  # (pixels, C) dense
    w1_ptr,
    b1_ptr,
    w2_ptr,
    gamma_ptr,
    drop_scale_ptr,
    dw1_ptr,  # (splits, HIDDEN, C) fp32
    db1_ptr,  # (splits, HIDDEN) fp32
    g2_ptr,  # (splits, C, HIDDEN) fp32
    d_sums_ptr,  # (splits, C) fp32
    pixels,
    chunk,  # pixels of one split, a multiple of BP
    sample_pixels,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
    BH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """dW1 = du^T z, G2 = d^T g and their sums over a split's pixels; one program: BH rows of W1, all channels.

    Everything is transposed, (BH, BP), so that du^T and g^T go from one product to the next in registers.
    """
    compute: tl.constexpr = w1_ptr.dtype.element_ty
    whole: tl.constexpr = HIDDEN % BH == 0 and PIECES * BC == C
    hid = tl.program_id(0) * BH + tl.arange(0, BH)
    held = hid < HIDDEN
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, pixels)
    w1 = ()
    w2 = ()
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        w1 = w1 + (load_matrix(w1_ptr, hid, c, HIDDEN, C, whole),)
        turned = load_transposed(w2_ptr, c, hid, C, HIDDEN, whole)
        if gamma_ptr is not None:
            turned = (turned.to(tl.float32) * load_vector(gamma_ptr, c, c < C)[None, :]).to(compute)
        w2 = w2 + (turned,)
    bias = tl.zeros((BH,), dtype=tl.float32)
    if b1_ptr is not None:
        bias = load_vector(b1_ptr, hid, held)
    dw1 = zero_pieces(BH, BC, PIECES)
    g2 = zero_pieces(BH, BC, PIECES)
    db1 = tl.zeros((BH,), dtype=tl.float32)
    d_sums = ()
    for _ in tl.static_range(PIECES):
        d_sums = d_sums + (tl.zeros((BC,), dtype=tl.float32),)
    for start in range(begin, end, BP):
        p = start + tl.arange(0, BP)
        inside = p < end
        row = p.to(tl.int64)[:, None] * C
        u = tl.zeros((BH, BP), dtype=tl.float32)
        dg = tl.zeros((BH, BP), dtype=tl.float32)
        zs = ()
        ds = ()
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            mask = inside[:, None] & (c < C)[None, :]
            z = tl.load(z_ptr + row + c[None, :], mask=mask, other=0.0)
            d = tl.load(dout_ptr + row + c[None, :], mask=mask, other=0.0)
            if drop_scale_ptr is not None:
                d = d.to(tl.float32) * load_vector(drop_scale_ptr, p // sample_pixels, inside)[:, None]
            d = d.to(compute)
            u = tl.dot(w1[j], z.T, u)
            dg = tl.dot(w2[j], d.T, dg)
            zs = zs + (z,)
            ds = ds + (d,)
        if tl.program_id(0) == 0:
            sums = ()
            for j in tl.static_range(PIECES):
                sums = sums + (d_sums[j] + tl.sum(ds[j].to(tl.float32), axis=0),)
            d_sums = sums
        g, derivative = activate_and_derivative(u + bias[:, None], ACTIVATION)
        du = dg * derivative  # 0 for pixels past the end, because d is; so is the product of g and d
        db1 += tl.sum(du, axis=1)
        du = du.to(compute)
        g = g.to(compute)
        a = ()
        b = ()
        for j in tl.static_range(PIECES):
            a = a + (tl.dot(du, zs[j], dw1[j]),)
            b = b + (tl.dot(g, ds[j], g2[j]),)
        dw1 = a
        g2 = b
    tl.store(db1_ptr + tl.program_id(1) * HIDDEN + hid, db1, mask=held)
    split = tl.program_id(1).to(tl.int64) * (C * HIDDEN)
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        mask = held[:, None] & (c < C)[None, :]
        tl.store(dw1_ptr + split + hid[:, None] * C + c[None, :], dw1[j], mask=mask)
        tl.store(g2_ptr + split + c[None, :] * HIDDEN + hid[:, None], g2[j], mask=mask)
        if tl.program_id(0) == 0:
            tl.store(d_sums_ptr + tl.program_id(1) * C + c, d_sums[j], mask=c < C)
