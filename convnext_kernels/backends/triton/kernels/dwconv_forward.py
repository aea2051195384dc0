"""Kernels of the depthwise convolution's forward pass and input gradient, one output tile per thread.

    y[n, c, h, w] = bias[c] + sum_kh,kw weight[c, kh, kw] * x[n, c, h + (kh - KH // 2) * DH, w + (kw - KW // 2) * DW]

The input gradient is the same sum over dy with the weight rotated by 180 degrees (FLIP), plus a residual if given.

A thread owns one channel and Q columns. Every element of a Triton tensor is one thread, and a Python tuple of such
tensors has the values of a thread: so accumulators, weights and a row of x stay in registers, offsets within a row are
constants, and a loaded and converted value of x is used for up to KH * KW multiply-adds. Lanes run over channels first
for NHWC and over columns first for NCHW.

Height and width are run-time values. The last group of columns is moved to end where the image ends, so all Q columns
of a group are inside; what two groups have is computed and stored twice, with the same bits. Taps outside the image are
masked loads or, if the tile is as wide as the image, not compiled at all. (They are never multiplied by zero, because
inf and NaN would spread.)

- `rolling_kernel`, up to 51 taps: a loop over input rows carries KH x Q accumulators; each row of x is loaded once.
- `plane_kernel`, up to 51 taps and images up to 7 x 7: the whole plane per thread, no tap outside the image.
- `rows_kernel` in dwconv_rows.py, any kernel and stride, and volumes.

X2: a thread owns two neighbouring channels instead of one (NHWC only), and sm_100 multiplies and adds both in one
instruction. Values are then int64 tensors with two fp32 numbers each. `dwconv_plan.two_channels` says where.
"""

# Inside kernels, tuples support only +, and conditions at compile time only plain ifs.
# ruff: noqa: SIM102, SIM108

import torch
import triton
import triton.language as tl

from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous

COUNTS = [
    "samples",
    "x_sn",
    "y_sn",
    "residual_sn",
    "depth",
    "height",
    "width",
    "strip",
    "one",
]  # they vary from call to call: no recompilation for them


# Whether kernels are compiled to PTX: not in the interpreter (decided when they are decorated), not for AMD's GPUs
_PTX = tl.constexpr(not device.interpreted() and torch.version.hip is None)


@triton.jit
def as_float32(v, ROUND: tl.constexpr):
    """Round to the compute dtype if that is another one, then widen; bf16 by a shift, which needs fewer registers.

    fp16 by an inline instruction: LLVM would pack values in pairs to widen them (one pair with an undefined half if
    their number is odd) and unpack them again, which takes twice the instructions.
    """
    if ROUND is not None:
        v = v.to(tl.float32).to(ROUND)
    if v.dtype == tl.bfloat16:
        return (v.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if v.dtype == tl.float16 and _PTX:
        bits = v.to(tl.int16, bitcast=True)
        return tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [bits], tl.float32, is_pure=True, pack=1)
    return v.to(tl.float32)


@triton.jit
def two(a, b):
    """Two fp32 numbers as one int64: the values of X2."""
    return tl.inline_asm_elementwise("mov.b64 $0, {$1, $2};", "=l,f,f", [a, b], tl.int64, is_pure=True, pack=1)


@triton.jit
def multiply_add_two(a, w, x):
    """Multiply and add two numbers each: a + w * x."""
    return tl.inline_asm_elementwise(
        "fma.rn.f32x2 $0, $1, $2, $3;", "=l,l,l,l", [w, x, a], tl.int64, is_pure=True, pack=1
    )


@triton.jit
def add_two(a, b):
    """Add two numbers each: a + b."""
    return tl.inline_asm_elementwise("add.rn.f32x2 $0, $1, $2;", "=l,l,l", [a, b], tl.int64, is_pure=True, pack=1)


@triton.jit
def widen_two(v, dtype: tl.constexpr):
    """Two neighbouring 16-bit elements, an int32, as fp32."""
    if dtype == tl.bfloat16:
        code: tl.constexpr = "{.reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; mov.b64 $0, {a, b};}"
    else:
        code: tl.constexpr = (
            "{.reg .b16 c, d; .reg .f32 a, b; mov.b32 {c, d}, $1; cvt.f32.f16 a, c; cvt.f32.f16 b, d; "
            "mov.b64 $0, {a, b};}"
        )
    return tl.inline_asm_elementwise(code, "=l,r", [v], tl.int64, is_pure=True, pack=1)


@triton.jit
def round_two(v, dtype: tl.constexpr):
    """Two fp32 numbers rounded to 16 bits, as an int32."""
    if dtype == tl.bfloat16:
        code: tl.constexpr = "{.reg .f32 a, b; mov.b64 {a, b}, $1; cvt.rn.bf16x2.f32 $0, b, a;}"
    else:
        code: tl.constexpr = "{.reg .f32 a, b; mov.b64 {a, b}, $1; cvt.rn.f16x2.f32 $0, b, a;}"
    return tl.inline_asm_elementwise(code, "=r,l", [v], tl.int32, is_pure=True, pack=1)


@triton.jit
def load_two(ptr, mask, ROUND: tl.constexpr):
    """Two neighbouring elements per thread in one load, the first with an even index; 0 where masked."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    both: tl.constexpr = tl.int64 if dtype == tl.float32 else tl.int32
    if mask is None:
        v = tl.load(ptr.to(tl.pointer_type(both), bitcast=True))
    else:
        v = tl.load(ptr.to(tl.pointer_type(both), bitcast=True), mask=mask, other=0)
    if dtype != tl.float32:
        v = widen_two(v, dtype)
    elif ROUND is not None:
        v = widen_two(round_two(v, ROUND), ROUND)
    return v


@triton.jit
def load(ptr, mask, ROUND: tl.constexpr, X2: tl.constexpr = False):
    """One element per thread as fp32; 0 where masked. A mask costs one more instruction than None."""
    if X2:
        v = load_two(ptr, mask, ROUND)
    elif mask is None:
        v = as_float32(tl.load(ptr), ROUND)
    else:
        v = as_float32(tl.load(ptr, mask=mask, other=0.0), ROUND)
    return v


@triton.jit
def load_parameter(ptr, CHANNEL: tl.constexpr, ROUND: tl.constexpr, X2: tl.constexpr):
    """A weight or a bias of a thread's channel, or of its two channels, which are CHANNEL elements apart."""
    v = load(ptr, None, ROUND)
    if X2:
        v = two(v, load(ptr + CHANNEL, None, ROUND))
    return v


@triton.jit
def both(a, b):
    """Both masks combined by "and"; the first may be None, which means all."""
    if a is None:
        mask = b
    else:
        mask = a & b
    return mask


@triton.jit
def decode(lane, C: tl.constexpr, groups, CHANNELS_FIRST: tl.constexpr):
    """Lane -> (channel, column group, sample), so that neighbouring lanes are neighbours in memory."""
    if CHANNELS_FIRST:
        channel = lane // groups
        return channel % C, lane - channel * groups, channel // C
    position = lane // C
    n = (position.to(tl.uint32) // tl.cast(groups, tl.uint32)).to(tl.int32)  # 20 SASS instructions less than signed
    return lane - position * C, position - n * groups, n


@triton.jit
def place(c, pixel, pixels, C: tl.constexpr, CHANNELS_FIRST: tl.constexpr):
    """The offset of an element in a dense sample, NCHW or NHWC, of `pixels`; `pixel` may be outside."""
    if CHANNELS_FIRST:
        return c.to(tl.int64) * pixels + pixel
    return pixel.to(tl.int64) * C + c


@triton.jit
def load_columns(
    ptr,
    column,
    width,
    inside,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    Q: tl.constexpr,
    EDGES: tl.constexpr,
    STRIDE: tl.constexpr,
    ROUND: tl.constexpr,
    X2: tl.constexpr = False,
):
    """COUNT neighbouring elements of an image row, from `ptr` at `column` + FIRST on; 0 outside the image.

    `inside`: a mask for the whole row, or None. The Q columns from `column` on are in the image. EDGES "image": they
    are the image, so it is known at compile time which columns are outside, and their loads are not compiled. EDGES
    "inside": each column beside them needs a predicate, which the compiler moves out of the row loop.
    """
    values = ()
    for j in tl.static_range(COUNT):
        if EDGES == "image":
            if FIRST + j >= 0 and FIRST + j < Q:
                values = values + (load(ptr + j * STRIDE, inside, ROUND, X2),)
            else:
                values = values + (0.0,)
        elif FIRST + j < 0:
            values = values + (load(ptr + j * STRIDE, both(inside, column >= -(FIRST + j)), ROUND, X2),)
        elif FIRST + j >= Q:
            values = values + (load(ptr + j * STRIDE, both(inside, column < width - (FIRST + j)), ROUND, X2),)
        else:
            values = values + (load(ptr + j * STRIDE, inside, ROUND, X2),)
    return values


@triton.jit
def store_columns(y_ptr, residual_ptr, values, inside, Q: tl.constexpr, Y_SW: tl.constexpr, X2: tl.constexpr = False):
    """Store Q neighbouring results of one row, with the residual added."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for q in tl.static_range(Q):
        value = values[q]
        if X2:
            if residual_ptr is not None:
                value = add_two(value, load_two(residual_ptr + q * Y_SW, inside, None))
            if dtype == tl.float32:
                tl.store((y_ptr + q * Y_SW).to(tl.pointer_type(tl.int64), bitcast=True), value, mask=inside)
            else:
                value = round_two(value, dtype)
                tl.store((y_ptr + q * Y_SW).to(tl.pointer_type(tl.int32), bitcast=True), value, mask=inside)
        else:
            if residual_ptr is not None:
                value += tl.load(residual_ptr + q * Y_SW, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + q * Y_SW, value.to(dtype), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def rolling_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    samples,
    x_sn,
    y_sn,
    residual_sn,
    height,
    width,
    strip,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    X_FIRST: tl.constexpr,
    Y_FIRST: tl.constexpr,
    WEIGHT: tl.constexpr,
    FLIP: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    Q: tl.constexpr,
    EDGES: tl.constexpr,
    X2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A strip of output rows, Q columns: KH x Q accumulators. Every input row completes the oldest of their rows.

    Grid (lanes, strips * DH). With dilation, rows of different residues modulo DH are independent: a strip has the rows
    of one residue, and `t` counts these. X_FIRST, Y_FIRST: NCHW instead of NHWC; the residual is like y. WEIGHT:
    strides of (c, kh, kw).
    """
    wait_for_previous(PDL)
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    X_SW: tl.constexpr = 1 if X_FIRST else C
    Y_SW: tl.constexpr = 1 if Y_FIRST else C
    if EDGES == "image":
        width = Q
    x_sh = width * X_SW
    y_sh = width * Y_SW
    pixels = height * width
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, g, n = decode(lane, C // 2 if X2 else C, (width + Q - 1) // Q, Y_FIRST)
    if X2:
        c *= 2
    inside = n < samples
    column = tl.minimum(g * Q, width - Q)
    residue = tl.program_id(1) % DH
    own = (height - residue + DH - 1) // DH  # rows of this residue
    first = tl.program_id(1) // DH * strip
    end = tl.minimum(first + strip, own)
    low = tl.maximum(first - P, 0)
    high = tl.minimum(end + P, own)

    n = tl.minimum(n, samples - 1).to(tl.int64)  # threads too many load what the last sample's do, and store nothing
    x_ptr += n * x_sn + place(c, (residue + low * DH) * width + column - PW * DW, pixels, C, X_FIRST)
    pixel = (residue + (low - P) * DH) * width + column
    y_ptr += n * y_sn + place(c, pixel, pixels, C, Y_FIRST)
    if residual_ptr is not None:
        residual_ptr += n * residual_sn + place(c, pixel, pixels, C, Y_FIRST)
    w_ptr = weight_ptr + c * WEIGHT[0]
    w = ()
    for i in tl.static_range(KH * KW):
        if FLIP:
            tap = (KH - 1 - i // KW) * WEIGHT[1] + (KW - 1 - i % KW) * WEIGHT[2]
        else:
            tap = (i // KW) * WEIGHT[1] + (i % KW) * WEIGHT[2]
        w = w + (load_parameter(w_ptr + tap, WEIGHT[0], ROUND_WEIGHT, X2),)
    if bias_ptr is None:
        bias = tl.zeros((BLOCK,), tl.int64 if X2 else tl.float32)
    else:
        bias = load_parameter(bias_ptr + c, 1, None, X2)
    acc = ()
    for _ in tl.static_range((KH - 1) * Q):
        acc = acc + (bias,)

    for t in range(low, high):
        x = load_columns(x_ptr, column, width, None, Q + (KW - 1) * DW, -PW * DW, Q, EDGES, X_SW, ROUND, X2)
        # acc[b * Q + q] is output row t - P + b, to which row t of x contributes with kernel row KH - 1 - b
        rows = ()
        for b in tl.static_range(KH):
            for q in tl.static_range(Q):
                a = acc[b * Q + q] if b < KH - 1 else bias
                for kw in tl.static_range(KW):
                    if EDGES != "image" or (q + (kw - PW) * DW >= 0 and q + (kw - PW) * DW < Q):
                        if X2:
                            a = multiply_add_two(a, w[(KH - 1 - b) * KW + kw], x[q + kw * DW])
                        else:
                            a += w[(KH - 1 - b) * KW + kw] * x[q + kw * DW]
                rows = rows + (a,)
        # A vector like `inside`: Triton 3.9's interpreter cannot combine a scalar comparison and a vector to a mask.
        row = tl.full((BLOCK,), t - P, tl.int32)
        store_columns(y_ptr, residual_ptr, rows, inside & (row >= first), Q, Y_SW, X2)
        acc = rows[Q:]
        x_ptr += x_sh * DH
        y_ptr += y_sh * DH
        if residual_ptr is not None:
            residual_ptr += y_sh * DH

    if high < end + P:  # the image ends here: no other row of x contributes to the incomplete rows
        for b in tl.static_range(P):
            row = tl.full((BLOCK,), high - P + b, tl.int32)
            held = inside & (row >= first) & (row < end)
            store_columns(y_ptr, residual_ptr, acc[b * Q :], held, Q, Y_SW, X2)
            y_ptr += y_sh * DH
            if residual_ptr is not None:
                residual_ptr += y_sh * DH


@triton.jit
def advance(ptrs, step, COUNT: tl.constexpr):
    """All pointers of a tuple, advanced by `step`."""
    moved = ()
    for i in tl.static_range(COUNT):
        moved = moved + (ptrs[i] + step,)
    return moved


@triton.jit(do_not_specialize=COUNTS)
def plane_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    samples,
    x_sn,
    y_sn,
    residual_sn,
    one,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    WEIGHT: tl.constexpr,
    FLIP: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One whole small plane per thread; taps outside the image are not compiled."""
    wait_for_previous(PDL)
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, _, n = decode(lane, C, 1, CHANNELS_FIRST)
    inside = n < samples
    n = tl.minimum(n, samples - 1).to(tl.int64)  # threads too many load what the last sample's do, and store nothing
    x_ptr += n * x_sn + c * X[0]
    y_ptr += n * y_sn + c * Y[0]
    w_ptr = weight_ptr + c * WEIGHT[0]
    if FLIP:
        w_ptr += (KH - 1) * WEIGHT[1] + (KW - 1) * WEIGHT[2]
    if residual_ptr is not None:
        residual_ptr += n * residual_sn + c * Y[0]
    if bias_ptr is None:
        bias = tl.zeros((BLOCK,), tl.float32)
    else:
        bias = tl.load(bias_ptr + c).to(tl.float32)
    SIGN: tl.constexpr = -1 if FLIP else 1
    # Triton's coalescing pass follows every pointer through the whole computation, 1400 multiply-adds, loads and
    # stores, which takes 12 s. It stops at pointers that a loop carries: with a loop it takes 0.9 s. So there is a loop
    # with one iteration, but the compiler does not know that it is one.
    w_ptrs = ()
    for i in tl.static_range(KH * KW):
        w_ptrs = w_ptrs + (w_ptr + SIGN * ((i // KW) * WEIGHT[1] + (i % KW) * WEIGHT[2]),)
    x_ptrs = ()
    y_ptrs = ()
    residual_ptrs = ()
    for i in tl.static_range(H * W):
        x_ptrs = x_ptrs + (x_ptr + ((i // W) * X[1] + (i % W) * X[2]),)
        y_ptrs = y_ptrs + (y_ptr + ((i // W) * Y[1] + (i % W) * Y[2]),)
        if residual_ptr is not None:
            residual_ptrs = residual_ptrs + (residual_ptr + ((i // W) * Y[1] + (i % W) * Y[2]),)
    for _ in range(one):
        w = ()
        for i in tl.static_range(KH * KW):
            w = w + (load(w_ptrs[i], None, ROUND_WEIGHT),)
        x = ()
        for i in tl.static_range(H * W):
            x = x + (load(x_ptrs[i], None, ROUND),)
        for h in tl.static_range(H):
            for q in tl.static_range(W):
                a = bias
                for i in tl.static_range(KH * KW):
                    if h + (i // KW - P) * DH >= 0 and h + (i // KW - P) * DH < H:
                        if q + (i % KW - PW) * DW >= 0 and q + (i % KW - PW) * DW < W:
                            a += w[i] * x[(h + (i // KW - P) * DH) * W + q + (i % KW - PW) * DW]
                if residual_ptr is not None:
                    a += tl.load(residual_ptrs[h * W + q]).to(tl.float32)
                tl.store(y_ptrs[h * W + q], a.to(y_ptr.dtype.element_ty), mask=inside)
        w_ptrs = advance(w_ptrs, one, KH * KW)
        x_ptrs = advance(x_ptrs, one, H * W)
        y_ptrs = advance(y_ptrs, one, H * W)
        if residual_ptr is not None:
            residual_ptrs = advance(residual_ptrs, one, H * W)


@triton.jit
def pack_kernel(
    weight_ptr,
    packed_ptr,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """(C, 1, KH, KW) -> fp32 (KH * KW, C), rounded to the compute dtype, so that neighbouring lanes read neighbours."""
    wait_for_previous(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, tap = i // (KH * KW), i % (KH * KW)
    v = load(weight_ptr + c * WEIGHT[0] + (tap // KW) * WEIGHT[1] + (tap % KW) * WEIGHT[2], c < C, ROUND)
    tl.store(packed_ptr + tap * C + c, v, mask=c < C)
