"""The whole ConvNeXt block in one kernel, for inference and few channels: neither y nor the hidden leaves the chip.

One program computes BM consecutive pixels of a sample: the convolution with one load for each tap (the neighbours are
in the L1 cache), then LayerNorm and both products as in mlp_fused.py, then the residual. Bytes per pixel with 16-bit
elements: 4C (x, out) instead of 10C, and 16 C^2 / BM from L2.

The convolution takes 3 to 4 times the instructions of dwconv_forward.py, whose threads hold a window of x in registers:
so it is for GPUs whose memory is slow beside their arithmetic (block_plan.py).
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.activations import activate
from convnext_kernels.backends.triton.kernels.mlp_tiles import (
    load_transposed,
    load_vector,
    normed_pieces,
    store_output,
    zero_pieces,
)


@triton.jit
def convolved_pieces(
    x_ptr,
    weight_ptr,
    bias_ptr,
    row,
    p,
    inside,
    height,
    width,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The depthwise convolution of a tile's pixels, in COMPUTE; `row`: each one's first element."""
    h = p // width
    w = p % width
    sums = zero_pieces(BM, BC, PIECES)
    for kh in range(K):
        above = h + (kh - K // 2)
        for kw in tl.static_range(K):
            left = w + (kw - K // 2)
            held = inside & (above >= 0) & (above < height) & (left >= 0) & (left < width)
            shift = ((kh - K // 2) * width + (kw - K // 2)) * C
            added = ()
            for j in tl.static_range(PIECES):
                c = j * BC + tl.arange(0, BC)
                x = tl.load(
                    x_ptr + (row + shift)[:, None] + c[None, :], mask=held[:, None] & (c < C)[None, :], other=0.0
                )
                tap = load_vector(weight_ptr + (kh * K + kw) * C, c, c < C)
                added = added + (sums[j] + x.to(tl.float32) * tap[None, :],)
            sums = added
    pieces = ()
    for j in tl.static_range(PIECES):
        y = sums[j]
        if bias_ptr is not None:
            c = j * BC + tl.arange(0, BC)
            y += load_vector(bias_ptr, c, c < C)[None, :]
        pieces = pieces + (y.to(COMPUTE),)
    return pieces


@triton.jit(do_not_specialize=["height", "width", "tiles"])
def block_fwd_kernel(
    x_ptr,  # (N, H, W, C) dense
    weight_ptr,  # (K, K, C) fp32: of `pack_kernel`
    bias_ptr,
    norm_weight_ptr,  # (C,); (N, C) if ADAPTIVE, as the bias
    norm_bias_ptr,
    w1_ptr,  # (HIDDEN, C) dense
    b1_ptr,
    w2_ptr,  # (C, HIDDEN) dense
    b2_ptr,
    gamma_ptr,
    drop_scale_ptr,
    out_ptr,  # like x
    height,
    width,
    tiles,
    eps,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
    BH: tl.constexpr,
    NORM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One program: BM pixels of one sample."""
    compute: tl.constexpr = w1_ptr.dtype.element_ty
    whole: tl.constexpr = HIDDEN % BH == 0 and PIECES * BC == C
    pixels = height * width
    n = tl.program_id(0) // tiles
    p = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    inside = p < pixels
    row = (n.to(tl.int64) * pixels + p) * C
    y = convolved_pieces(x_ptr, weight_ptr, bias_ptr, row, p, inside, height, width, compute, C, K, BM, BC, PIECES)
    if ADAPTIVE:
        norm_weight_ptr += n.to(tl.int64) * C
        norm_bias_ptr += n.to(tl.int64) * C
    z = normed_pieces(y, norm_weight_ptr, norm_bias_ptr, eps, compute, compute, C, BC, PIECES, NORM)
    acc = zero_pieces(BM, BC, PIECES)
    for start in range(0, HIDDEN, BH):
        hid = start + tl.arange(0, BH)
        u = tl.zeros((BM, BH), dtype=tl.float32)
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            u = tl.dot(z[j], load_transposed(w1_ptr, hid, c, HIDDEN, C, whole), u)
        if b1_ptr is not None:
            u += load_vector(b1_ptr, hid, hid < HIDDEN)[None, :]
        g = activate(u, ACTIVATION).to(compute)
        products = ()
        for j in tl.static_range(PIECES):
            c = j * BC + tl.arange(0, BC)
            products = products + (tl.dot(g, load_transposed(w2_ptr, c, hid, C, HIDDEN, whole), acc[j]),)
        acc = products
    parameters = (b2_ptr, gamma_ptr, drop_scale_ptr)
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        residual = (x_ptr, pixels * C, C, 1)
        out = (out_ptr, None, pixels * C, C, 1)
        store_output(acc[j], parameters, residual, out, n, p, c, inside, pixels, C)
