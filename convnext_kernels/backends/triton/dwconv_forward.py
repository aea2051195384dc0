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
- `rows_kernel`, any kernel and stride, and volumes: one output row or two, a loop over the kernel rows that are inside
  the image; of a volume inside a loop over the kernel planes.
  Two rows take 1.35 (K 13 on 28 x 28) and 1.46 (K 31 on 14 x 14) PTX instructions per tap inside the image, one row 1.6
  and 1.8.
"""

# Inside kernels, tuples support only +, and conditions at compile time only plain ifs.
# ruff: noqa: SIM102, SIM108

import torch
import triton
import triton.language as tl

from convnext_kernels.backends.triton import device

_COUNTS = [
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
def load(ptr, mask, ROUND: tl.constexpr):
    """One element per thread as fp32; 0 where masked. A mask costs one more instruction than None."""
    if mask is None:
        v = tl.load(ptr)
    else:
        v = tl.load(ptr, mask=mask, other=0.0)
    return as_float32(v, ROUND)


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
                values = values + (load(ptr + j * STRIDE, inside, ROUND),)
            else:
                values = values + (0.0,)
        elif FIRST + j < 0:
            values = values + (load(ptr + j * STRIDE, both(inside, column >= -(FIRST + j)), ROUND),)
        elif FIRST + j >= Q:
            values = values + (load(ptr + j * STRIDE, both(inside, column < width - (FIRST + j)), ROUND),)
        else:
            values = values + (load(ptr + j * STRIDE, inside, ROUND),)
    return values


@triton.jit
def store_columns(y_ptr, residual_ptr, values, inside, Q: tl.constexpr, Y_SW: tl.constexpr):
    """Store Q neighbouring results of one row, with the residual added."""
    for q in tl.static_range(Q):
        value = values[q]
        if residual_ptr is not None:
            value += tl.load(residual_ptr + q * Y_SW, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + q * Y_SW, value.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
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
    BLOCK: tl.constexpr,
):
    """A strip of output rows, Q columns: KH x Q accumulators. Every input row completes the oldest of their rows.

    Grid (lanes, strips * DH). With dilation, rows of different residues modulo DH are independent: a strip has the rows
    of one residue, and `t` counts these. X_FIRST, Y_FIRST: NCHW instead of NHWC; the residual is like y. WEIGHT:
    strides of (c, kh, kw).
    """
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
    c, g, n = decode(lane, C, (width + Q - 1) // Q, Y_FIRST)
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
            w = w + (load(w_ptr + (KH - 1 - i // KW) * WEIGHT[1] + (KW - 1 - i % KW) * WEIGHT[2], None, ROUND_WEIGHT),)
        else:
            w = w + (load(w_ptr + (i // KW) * WEIGHT[1] + (i % KW) * WEIGHT[2], None, ROUND_WEIGHT),)
    if bias_ptr is None:
        bias = tl.zeros((BLOCK,), tl.float32)
    else:
        bias = tl.load(bias_ptr + c).to(tl.float32)
    acc = ()
    for _ in tl.static_range((KH - 1) * Q):
        acc = acc + (bias,)

    for t in range(low, high):
        x = load_columns(x_ptr, column, width, None, Q + (KW - 1) * DW, -PW * DW, Q, EDGES, X_SW, ROUND)
        # acc[b * Q + q] is output row t - P + b, to which row t of x contributes with kernel row KH - 1 - b
        rows = ()
        for b in tl.static_range(KH):
            for q in tl.static_range(Q):
                a = acc[b * Q + q] if b < KH - 1 else bias
                for kw in tl.static_range(KW):
                    if EDGES != "image" or (q + (kw - PW) * DW >= 0 and q + (kw - PW) * DW < Q):
                        a += w[(KH - 1 - b) * KW + kw] * x[q + kw * DW]
                rows = rows + (a,)
        # A vector like `inside`: Triton 3.9's interpreter cannot combine a scalar comparison and a vector to a mask.
        row = tl.full((BLOCK,), t - P, tl.int32)
        store_columns(y_ptr, residual_ptr, rows, inside & (row >= first), Q, Y_SW)
        acc = rows[Q:]
        x_ptr += x_sh * DH
        y_ptr += y_sh * DH
        if residual_ptr is not None:
            residual_ptr += y_sh * DH

    if high < end + P:  # the image ends here: no other row of x contributes to the incomplete rows
        for b in tl.static_range(P):
            row = tl.full((BLOCK,), high - P + b, tl.int32)
            held = inside & (row >= first) & (row < end)
            store_columns(y_ptr, residual_ptr, acc[b * Q :], held, Q, Y_SW)
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


@triton.jit(do_not_specialize=_COUNTS)
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
):
    """One whole small plane per thread; taps outside the image are not compiled."""
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
def load_weights(w_ptr, KW: tl.constexpr, STEP: tl.constexpr, REACH: tl.constexpr, ROUND: tl.constexpr):
    """One kernel row. If the tile is as wide as the image, only the taps that reach into it: REACH to each side."""
    w = ()
    for kw in tl.static_range(KW):
        if kw - KW // 2 <= REACH and KW // 2 - kw <= REACH:
            w = w + (load(w_ptr + kw * STEP, None, ROUND),)
        else:
            w = w + (0.0,)
    return w


@triton.jit
def add_row(
    acc,
    w,
    x,
    Q: tl.constexpr,
    KW: tl.constexpr,
    DW: tl.constexpr,
    EDGES: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
):
    """Q columns of an output row, plus the products of one kernel row with one row of x.

    x begins with the column of the first tap that the first output has, whether that is in the image or not.
    """
    row = ()
    for q in tl.static_range(Q):
        a = acc[q]
        for kw in tl.static_range(KW):
            if EDGES != "image" or (q + (kw - KW // 2) * DW >= 0 and q + (kw - KW // 2) * DW < Q):
                if (q * DOWN + (kw - KW // 2) * DW) % UP == 0:
                    a += w[kw] * x[(q * DOWN + (kw - KW // 2) * DW) // UP + (KW // 2 * DW) // UP]
        row = row + (a,)
    return row


@triton.jit
def add_rows(
    sums,
    x_ptr,
    w_ptr,
    low,
    high,
    first,
    width,
    x_sh,
    Q: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    EDGES: tl.constexpr,
    X_SW: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    W_SH: tl.constexpr,
    W_SW: tl.constexpr,
    PAIR: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
):
    """The Q columns of an output row (and of the one below it, if a PAIR), plus kernel rows `low` to `high`.

    x_ptr: the row of kernel row `low`; w_ptr: that kernel row. W_SH, W_SW: from kernel row to kernel row, tap to tap.
    """
    PW: tl.constexpr = KW // 2
    REACH_X: tl.constexpr = PW * DW // UP  # columns of x that a group reads before its first column
    HELD: tl.constexpr = (Q - 1) * DOWN // UP + 1  # of its own columns, which are in the image
    COUNT: tl.constexpr = ((Q - 1) * DOWN + PW * DW) // UP + REACH_X + 1
    REACH: tl.constexpr = (Q - 1) // DW if EDGES == "image" else PW
    STEPS: tl.constexpr = UP if DH % UP else 1  # kernel rows from one that meets a row of x to the next
    acc = sums[:Q]
    if PAIR:
        below = sums[Q:]
        # The upper of the first iteration's two kernel rows; if low is 0 it does not exist and is not used
        w = load_weights(w_ptr - tl.minimum(low, 1) * W_SH, KW, W_SW, REACH, ROUND_WEIGHT)
        for kh in range(low, high):
            x = load_columns(x_ptr, first, width, None, COUNT, -REACH_X, HELD, EDGES, X_SW, ROUND)
            if kh > 0:
                below = add_row(below, w, x, Q, KW, DW, EDGES, DOWN, UP)
            if kh < KH:
                w = load_weights(w_ptr, KW, W_SW, REACH, ROUND_WEIGHT)
                acc = add_row(acc, w, x, Q, KW, DW, EDGES, DOWN, UP)
            x_ptr += x_sh * DH
            w_ptr += W_SH
        acc = acc + below
    else:
        for _ in range(low, high, STEPS):
            x = load_columns(x_ptr, first, width, None, COUNT, -REACH_X, HELD, EDGES, X_SW, ROUND)
            w = load_weights(w_ptr, KW, W_SW, REACH, ROUND_WEIGHT)
            acc = add_row(acc, w, x, Q, KW, DW, EDGES, DOWN, UP)
            x_ptr += x_sh * (DH * STEPS // UP)
            w_ptr += W_SH * STEPS
    return acc


@triton.jit(do_not_specialize=_COUNTS)
def rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    samples,
    x_sn,
    y_sn,
    residual_sn,
    depth,
    height,
    width,
    C: tl.constexpr,
    KD: tl.constexpr,
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
    PAIR: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Q columns of one output row, or of a PAIR of rows. For all lanes of a program the same kernel rows are inside.

    Grid (lanes, height), or (lanes, pairs * DH): the rows of a pair are DH apart, so that they need the same rows of x.
    A loaded row of x is then used for both, with kernel rows kh and kh - 1; the latter's weights are still in registers
    from the iteration before.

    DOWN: the stride. UP: the stride of the convolution whose input gradient this is: output o has the taps for which
    o + (k - K // 2) * D is a multiple of UP, and this quotient is their row or column of x. `height` and `width` are
    those of the larger of the two images. With UP all groups of columns begin at even ones.

    A volume has a `depth` (None: an image) and one more axis of the grid, the planes of the result. Its kernel planes
    are KH kernel rows apart in the weights.
    """
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    X_SW: tl.constexpr = 1 if X_FIRST else C
    Y_SW: tl.constexpr = 1 if Y_FIRST else C
    if EDGES == "image":
        width = Q
    x_height = height
    y_height = height
    x_width = width
    y_width = width
    if DOWN > 1:
        y_height = (height - 1) // DOWN + 1
        y_width = (width - 1) // DOWN + 1
    if UP > 1:
        x_height = (height - 1) // UP + 1
        x_width = (width - 1) // UP + 1
    x_sh = x_width * X_SW
    y_sh = y_width * Y_SW
    x_pixels = x_height * x_width
    y_pixels = y_height * y_width
    REACH_X: tl.constexpr = PW * DW // UP  # as in add_rows
    BETWEEN: tl.constexpr = Q - Q % UP if Q > 1 else 1  # columns from group to group
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, g, n = decode(lane, C, (y_width - (Q - BETWEEN) + BETWEEN - 1) // BETWEEN, Y_FIRST)
    inside = n < samples
    column = tl.minimum(g * BETWEEN, y_width - Q)
    if PAIR:
        o = tl.program_id(1) % DH + tl.program_id(1) // DH * (2 * DH)
        high = tl.minimum(P + (height - 1 - o) // DH + 1, KH + 1)
    else:
        o = tl.program_id(1)
        high = tl.minimum(P + ((x_height - 1) * UP - o * DOWN) // DH + 1, KH)
    low = tl.maximum(P - o * DOWN // DH, 0)
    STEPS: tl.constexpr = UP if DH % UP else 1  # kernel rows from one that meets a row of x to the next
    if UP > 1:
        odd = (o + (low - P) * DH) % UP
        if STEPS > 1:
            low += odd
        else:
            high = tl.where(odd == 0, high, low)

    n = tl.minimum(n, samples - 1).to(tl.int64)  # threads too many load what the last sample's do, and store nothing
    x_row = (o * DOWN + (low - P) * DH) // UP
    first = column * DOWN // UP
    if depth is None:
        x_ptr += n * x_sn + place(c, x_row * x_width + first - REACH_X, x_pixels, C, X_FIRST)
    else:
        z = tl.program_id(2)
        x_depth = depth
        y_depth = depth
        if DOWN > 1:
            y_depth = (depth - 1) // DOWN + 1
        if UP > 1:
            x_depth = (depth - 1) // UP + 1
        front = tl.maximum(KD // 2 - z * DOWN, 0)
        back = tl.minimum(KD // 2 + (x_depth - 1) * UP - z * DOWN + 1, KD)
        if UP > 1:
            front += (z + front - KD // 2) % UP
        x_plane = (z * DOWN + front - KD // 2) // UP
        x_pixel = (x_plane * x_height + x_row) * x_width + first - REACH_X
        x_ptr += n * x_sn + place(c, x_pixel, x_depth * x_pixels, C, X_FIRST)
    w_ptr = weight_ptr + c * WEIGHT[0]
    if FLIP:
        w_ptr += (KH - 1 - low) * WEIGHT[1] + (KW - 1) * WEIGHT[2]
    else:
        w_ptr += low * WEIGHT[1]
    SIGN: tl.constexpr = -1 if FLIP else 1
    W_SH: tl.constexpr = SIGN * WEIGHT[1]
    W_SW: tl.constexpr = SIGN * WEIGHT[2]
    if bias_ptr is None:
        bias = tl.zeros((BLOCK,), tl.float32)
    else:
        bias = tl.load(bias_ptr + c).to(tl.float32)
    sums = ()
    for _ in tl.static_range(2 * Q if PAIR else Q):
        sums = sums + (bias,)
    if depth is None:  # without a loop, so that images compile to the same code as before there were volumes
        sums = add_rows(
            sums,
            x_ptr,
            w_ptr,
            low,
            high,
            first,
            x_width,
            x_sh,
            Q,
            KH,
            KW,
            DH,
            DW,
            EDGES,
            X_SW,
            ROUND,
            ROUND_WEIGHT,
            W_SH,
            W_SW,
            PAIR,
            DOWN,
            UP,
        )
    else:
        if FLIP:
            w_ptr += (KD - 1 - front) * (KH * WEIGHT[1])
        else:
            w_ptr += front * (KH * WEIGHT[1])
        for _ in range(front, back, UP):
            sums = add_rows(
                sums,
                x_ptr,
                w_ptr,
                low,
                high,
                first,
                x_width,
                x_sh,
                Q,
                KH,
                KW,
                DH,
                DW,
                EDGES,
                X_SW,
                ROUND,
                ROUND_WEIGHT,
                W_SH,
                W_SW,
                PAIR,
                DOWN,
                UP,
            )
            x_ptr += x_sh * x_height
            w_ptr += W_SH * (KH * UP)
    y_row = o
    if depth is not None:
        y_row += z * y_height
        y_pixels *= y_depth
    y_ptr += n * y_sn + place(c, y_row * y_width + column, y_pixels, C, Y_FIRST)
    if residual_ptr is not None:
        residual_ptr += n * residual_sn + place(c, y_row * y_width + column, y_pixels, C, Y_FIRST)
    row = tl.full((BLOCK,), o, tl.int32)  # as in rolling_kernel
    store_columns(y_ptr, residual_ptr, sums[:Q], inside & (row < y_height), Q, Y_SW)
    if PAIR:
        y_ptr += DH * y_sh
        if residual_ptr is not None:
            residual_ptr += DH * y_sh
        store_columns(y_ptr, residual_ptr, sums[Q:], inside & (row + DH < y_height), Q, Y_SW)


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
):
    """(C, 1, KH, KW) -> fp32 (KH * KW, C), rounded to the compute dtype, so that neighbouring lanes read neighbours."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, tap = i // (KH * KW), i % (KH * KW)
    v = load(weight_ptr + c * WEIGHT[0] + (tap // KW) * WEIGHT[1] + (tap % KW) * WEIGHT[2], c < C, ROUND)
    tl.store(packed_ptr + tap * C + c, v, mask=c < C)
