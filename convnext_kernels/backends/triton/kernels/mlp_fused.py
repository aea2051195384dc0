"""The bottleneck in one kernel, the hidden on chip: out = residual + s * gamma * (act(norm(x) W1^T + b1) W2^T + b2).

One program normalises BM pixels once, keeps them, and loops over the hidden in chunks of BH columns, as attention loops
over its keys: u = z W1[chunk]^T, h = act(u + b1), acc += h W2[:, chunk]^T. Bytes per pixel with 16-bit elements: 6C
(x, residual, out), and 16 C^2 / BM from L2, from which every program reads both weights; the latter limits the speed
(predicted).

ConvNeXt V2 needs the sum over a sample's pixels of the squared hidden between the two matmuls. So the kernel runs
twice: first for the sums (`sums_ptr`), then with their response as `grn_scale_ptr`. That takes 8C bytes and the first
matmul once more, but not the 16C bytes for writing and reading the hidden.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.activations import activate
from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.kernels.mlp_tiles import (
    load_pieces,
    load_transposed,
    load_vector,
    normed_pieces,
    store_output,
    zero_pieces,
)


@triton.jit(do_not_specialize=["pixels", "tiles", "sample_pixels"])
def mlp_fused_fwd_kernel(
    x_ptr,
    norm_weight_ptr,  # (C,); (N, C) if ADAPTIVE, as the bias
    norm_bias_ptr,
    w1_ptr,  # (HIDDEN, C) dense
    b1_ptr,
    w2_ptr,  # (C, HIDDEN) dense
    b2_ptr,
    gamma_ptr,
    grn_scale_ptr,  # (N, HIDDEN) fp32 or None
    grn_bias_ptr,
    drop_scale_ptr,
    residual_ptr,
    out_ptr,  # None: only the sums
    rounded_ptr,  # with the strides of out, or None: the residual in the dtype of the matmuls, for the gradient
    hidden_ptr,  # (N * HW, HIDDEN) or None: u for the gradient
    sums_ptr,  # (N, tiles, HIDDEN) fp32 or None: sums of h^2 over a tile
    pixels,  # of one sample, or of all samples if there is no gap between them
    tiles,
    sample_pixels,  # always of one sample
    stride_xn,
    stride_xp,
    stride_xc,
    stride_rn,
    stride_rp,
    stride_rc,
    stride_on,
    stride_op,
    stride_oc,
    eps,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
    BH: tl.constexpr,
    NORM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BM pixels of one sample."""
    wait_for_previous(PDL)
    compute: tl.constexpr = w1_ptr.dtype.element_ty
    whole: tl.constexpr = HIDDEN % BH == 0 and PIECES * BC == C
    n = tl.program_id(0) // tiles
    p = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    inside = p < pixels
    if ADAPTIVE:
        norm_weight_ptr += n.to(tl.int64) * C
        norm_bias_ptr += n.to(tl.int64) * C
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = load_pieces(x_ptr, n, p, inside, stride_xn, stride_xp, stride_xc, C, BC, PIECES)
    z = normed_pieces(x, norm_weight_ptr, norm_bias_ptr, eps, dtype, compute, C, BC, PIECES, NORM)
    if out_ptr is not None:
        acc = zero_pieces(BM, BC, PIECES)
    for start in range(0, HIDDEN, BH):
        hid = start + tl.arange(0, BH)
        held = hid < HIDDEN
        u = tl.zeros((BM, BH), dtype=tl.float32)
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            u = tl.dot(z[j], load_transposed(w1_ptr, hid, c, HIDDEN, C, whole), u)
        if b1_ptr is not None:
            u += load_vector(b1_ptr, hid, held)[None, :]
        if hidden_ptr is not None:
            row = n.to(tl.int64) * pixels + p
            where = hidden_ptr + row[:, None] * HIDDEN + hid[None, :]
            tl.store(where, u.to(compute), mask=inside[:, None] & held[None, :])
        h = activate(u, ACTIVATION).to(compute)
        if sums_ptr is not None:
            square = h.to(tl.float32)
            square = tl.where(inside[:, None], square * square, 0.0)
            tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + hid, tl.sum(square, axis=0), mask=held)
        if out_ptr is not None:
            if grn_scale_ptr is not None:
                scale = tl.load(grn_scale_ptr + n.to(tl.int64) * HIDDEN + hid, mask=held, other=0.0)
                scaled = h.to(tl.float32) * scale[None, :] + load_vector(grn_bias_ptr, hid, held)[None, :]
                h = scaled.to(compute)
            products = ()
            for j in tl.static_range(PIECES):
                c = j * BC + tl.arange(0, BC)
                products = products + (tl.dot(h, load_transposed(w2_ptr, c, hid, C, HIDDEN, whole), acc[j]),)
            acc = products
    if out_ptr is not None:
        parameters = (b2_ptr, gamma_ptr, drop_scale_ptr)
        residual = (residual_ptr, stride_rn, stride_rp, stride_rc)
        out = (out_ptr, rounded_ptr, stride_on, stride_op, stride_oc)
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            store_output(acc[j], parameters, residual, out, n, p, c, inside, sample_pixels, C)
