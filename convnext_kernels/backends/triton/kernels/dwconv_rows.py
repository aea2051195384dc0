"""Kernel of the depthwise convolution for any odd kernel and stride, and for volumes: one output row or two per thread.

As in dwconv_forward.py, where the formula and the tile of a thread are: a loop over the kernel rows that are inside the
image; of a volume inside a loop over the kernel planes. Two rows take 1.35 (K 13 on 28 x 28) and 1.46 (K 31 on 14 x 14)
PTX instructions per tap inside the image, one row 1.6 and 1.8.
"""

# Inside kernels, tuples support only +, and conditions at compile time only plain ifs.
# ruff: noqa: SIM102

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.kernels.dwconv_forward import (
    COUNTS,
    decode,
    load_columns,
    load_parameter,
    load_two,
    multiply_add_two,
    place,
    store_columns,
)


@triton.jit
def load_weights(
    w_ptr,
    KW: tl.constexpr,
    STEP: tl.constexpr,
    CHANNEL: tl.constexpr,
    REACH: tl.constexpr,
    ROUND: tl.constexpr,
    X2: tl.constexpr,
):
    """One kernel row. If the tile is as wide as the image, only the taps that reach into it: REACH to each side."""
    w = ()
    for kw in tl.static_range(KW):
        if kw - KW // 2 <= REACH and KW // 2 - kw <= REACH:
            if X2 and CHANNEL == 1:  # packed
                w = w + (load_two(w_ptr + kw * STEP, None, None),)
            else:
                w = w + (load_parameter(w_ptr + kw * STEP, CHANNEL, ROUND, X2),)
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
    X2: tl.constexpr,
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
                    if X2:
                        a = multiply_add_two(a, w[kw], x[(q * DOWN + (kw - KW // 2) * DW) // UP + (KW // 2 * DW) // UP])
                    else:
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
    W_SC: tl.constexpr,
    PAIR: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    X2: tl.constexpr,
):
    """The Q columns of an output row (and of the one below it, if a PAIR), plus kernel rows `low` to `high`.

    x_ptr: the row of kernel row `low`; w_ptr: that kernel row. W_SH, W_SW, W_SC: from kernel row to kernel row, tap to
    tap, channel to channel.
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
        w = load_weights(w_ptr - tl.minimum(low, 1) * W_SH, KW, W_SW, W_SC, REACH, ROUND_WEIGHT, X2)
        for kh in range(low, high):
            x = load_columns(x_ptr, first, width, None, COUNT, -REACH_X, HELD, EDGES, X_SW, ROUND, X2)
            if kh > 0:
                below = add_row(below, w, x, Q, KW, DW, EDGES, DOWN, UP, X2)
            if kh < KH:
                w = load_weights(w_ptr, KW, W_SW, W_SC, REACH, ROUND_WEIGHT, X2)
                acc = add_row(acc, w, x, Q, KW, DW, EDGES, DOWN, UP, X2)
            x_ptr += x_sh * DH
            w_ptr += W_SH
        acc = acc + below
    else:
        for _ in range(low, high, STEPS):
            x = load_columns(x_ptr, first, width, None, COUNT, -REACH_X, HELD, EDGES, X_SW, ROUND, X2)
            w = load_weights(w_ptr, KW, W_SW, W_SC, REACH, ROUND_WEIGHT, X2)
            acc = add_row(acc, w, x, Q, KW, DW, EDGES, DOWN, UP, X2)
            x_ptr += x_sh * (DH * STEPS // UP)
            w_ptr += W_SH * STEPS
    return acc


@triton.jit(do_not_specialize=COUNTS)
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
    X2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
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
    wait_for_previous(PDL)
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
    c, g, n = decode(lane, C // 2 if X2 else C, (y_width - (Q - BETWEEN) + BETWEEN - 1) // BETWEEN, Y_FIRST)
    if X2:
        c *= 2
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
        bias = tl.zeros((BLOCK,), tl.int64 if X2 else tl.float32)
    else:
        bias = load_parameter(bias_ptr + c, 1, None, X2)
    sums = ()
    for _ in tl.static_range(2 * Q if PAIR else Q):
        sums = sums + (bias,)
    if depth is None:  # a loop of one iteration, of which the compiler leaves nothing
        front = 0
        back = 1
    elif FLIP:
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
            WEIGHT[0],
            PAIR,
            DOWN,
            UP,
            X2,
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
    store_columns(y_ptr, residual_ptr, sums[:Q], inside & (row < y_height), Q, Y_SW, X2)
    if PAIR:
        y_ptr += DH * y_sh
        if residual_ptr is not None:
            residual_ptr += DH * y_sh
        store_columns(y_ptr, residual_ptr, sums[Q:], inside & (row + DH < y_height), Q, Y_SW, X2)
