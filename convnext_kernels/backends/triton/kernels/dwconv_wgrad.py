"""Kernels for the weight and bias gradient of the depthwise convolution: sums in registers, two stages, no atomics.

    dw[c, kh, kw] = sum_n,h,w dy[n, c, h, w] * x[n, c, h + (kh - P) * DH, w + (kw - PW) * DW],  P = KH // 2
    db[c] = sum_n,h,w dy[n, c, h, w],  PW = KW // 2

`partials_kernel`: a thread owns one channel, Q columns of dy and R of the KH kernel rows. It loops over rows of x, with
the R rows of dy that belong to them in registers: each row is loaded once, and R * KW * Q multiply-adds are added to
R * KW sums, without a halo that is computed twice. With R up to 2, rows outside of the image are skipped. The threads
of a channel are summed, and programs write fp32 partial sums (parts, KH * KW + 1, C), the bias gradient last.
`finish_kernel` adds the parts in a fixed order. As in the forward kernels the last group of columns is moved inside the
image; the columns of dy that the group before has too are 0 in it.

Of a volume a program has the kernel rows of one kernel plane, and its positions are those of all planes of dy whose
plane of x is inside.
"""

# Inside kernels, tuples support only +, and conditions at compile time only plain ifs.
# ruff: noqa: SIM102

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.kernels.dwconv_forward import load, load_columns, place


@triton.jit
def add_products(
    sums, dy, x, Q: tl.constexpr, KW: tl.constexpr, DW: tl.constexpr, EDGES: tl.constexpr, STRIDE: tl.constexpr
):
    """The sums of one kernel row, plus the products of Q columns of dy with a row of x."""
    new = ()
    for kw in tl.static_range(KW):
        a = sums[kw]
        for q in tl.static_range(Q):
            if EDGES != "image" or (q + (kw - KW // 2) * DW >= 0 and q + (kw - KW // 2) * DW < Q):
                a += dy[q] * x[q * STRIDE + kw * DW]
        new = new + (a,)
    return new


@triton.jit
def load_own(ptr, inside, others, Q: tl.constexpr, EDGES: tl.constexpr, STRIDE: tl.constexpr, ROUND: tl.constexpr):
    """Q columns of dy; 0 where not `inside`, and for the first `others`, which the group before has too."""
    values = ()
    if EDGES == "inside":
        others = tl.where(inside, others, Q)  # so that one comparison is the mask of a column
    for j in tl.static_range(Q):
        if EDGES == "inside":
            values = values + (load(ptr + j * STRIDE, others <= j, ROUND),)
        else:
            values = values + (load(ptr + j * STRIDE, inside, ROUND),)
    return values


@triton.jit
def add_columns(total, dy, Q: tl.constexpr):
    """`total` plus Q columns."""
    for q in tl.static_range(Q):
        total += dy[q]
    return total


@triton.jit(do_not_specialize=["samples", "dy_sn", "x_sn", "height", "width", "depth", "parts", "strip"])
def partials_kernel(
    dy_ptr,
    x_ptr,
    partials_ptr,
    samples,
    dy_sn,
    x_sn,
    depth,
    height,
    width,
    parts,
    strip,
    C: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    DY_FIRST: tl.constexpr,
    X_FIRST: tl.constexpr,
    ROUND_DY: tl.constexpr,
    ROUND: tl.constexpr,
    Q: tl.constexpr,
    EDGES: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (channel blocks * parts, strips * DH, kernel row blocks); a program has BC channels x BLOCK / BC positions.

    A position is a column group of a sample; a thread takes every (parts * positions of a program)-th position.
    As in the forward kernel a strip has the rows of one residue modulo DH. DY_FIRST, X_FIRST: NCHW.

    With STRIDE, R is 1 and a strip has neighbouring rows of dy, for any DH; `height` and `width` are x's.

    With a `depth` (None: an image) the last axis of the grid has the kernel row blocks of all kernel planes.
    """
    wait_for_previous(PDL)
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    DY_SW: tl.constexpr = 1 if DY_FIRST else C
    X_SW: tl.constexpr = 1 if X_FIRST else C
    if EDGES == "image":
        width = Q
    dy_height = height
    dy_width = width
    if STRIDE > 1:
        dy_height = (height - 1) // STRIDE + 1
        dy_width = (width - 1) // STRIDE + 1
    groups = (dy_width + Q - 1) // Q
    HELD: tl.constexpr = (Q - 1) * STRIDE + 1
    COUNT: tl.constexpr = HELD + (KW - 1) * DW
    LANES: tl.constexpr = BLOCK // BC
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    lane = tl.arange(0, BLOCK)
    if X_FIRST:
        c, position = lane // LANES, lane % LANES
    else:
        c, position = lane % BC, lane // BC
    c += tl.program_id(0) % BLOCKS * BC
    part = tl.program_id(0) // BLOCKS
    channel = tl.minimum(c, C - 1)

    LATTICES: tl.constexpr = DH if STRIDE == 1 else 1
    residue = tl.program_id(1) % LATTICES
    own = (dy_height - residue + LATTICES - 1) // LATTICES  # rows of this residue
    first = tl.program_id(1) // LATTICES * strip
    kh = tl.program_id(2) * R
    if depth is not None:
        ROWS: tl.constexpr = (KH + R - 1) // R  # of programs
        kd = tl.program_id(2) // ROWS
        kh = (tl.program_id(2) - kd * ROWS) * R
        # Planes of dy whose plane of x is inside
        dy_depth = (depth - 1) // STRIDE + 1
        front = (tl.maximum(KD // 2 - kd, 0) + STRIDE - 1) // STRIDE
        back = tl.minimum(dy_depth, (tl.maximum(depth + KD // 2 - kd, 0) + STRIDE - 1) // STRIDE)
        planes = tl.maximum(back - front, 0)
        samples *= planes
    x_sh = width * X_SW
    dy_sh = dy_width * DY_SW
    if STRIDE == 1:
        # Rows of x that one of these kernel rows multiplies with a row of dy
        low = tl.maximum(first, kh - P)
        high = tl.minimum(tl.minimum(first + strip, own), own - P + kh + R - 1)
        x_first = residue + low * DH
        dy_first = residue + (low + P - kh) * DH
    else:
        # Rows of dy whose row of x is in the image
        above = (kh - P) * DH
        low = tl.maximum(first, (tl.maximum(-above, 0) + STRIDE - 1) // STRIDE)
        high = tl.minimum(tl.minimum(first + strip, own), (tl.maximum(height - above, 0) + STRIDE - 1) // STRIDE)
        x_first = low * STRIDE + above
        dy_first = low
    if depth is None:
        x_ptr += place(channel, x_first * width - PW * DW, height * width, C, X_FIRST)
        dy_ptr += place(channel, dy_first * dy_width, dy_height * dy_width, C, DY_FIRST)
    else:
        x_ptr += place(channel, x_first * width - PW * DW, depth * height * width, C, X_FIRST)
        dy_ptr += place(channel, dy_first * dy_width, dy_depth * dy_height * dy_width, C, DY_FIRST)
    sums = ()
    for _ in tl.static_range(R * KW):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    db = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * LANES, samples * groups, parts * LANES):
        item = start + position
        inside = item < samples * groups
        n = (item.to(tl.uint32) // tl.cast(groups, tl.uint32)).to(tl.int32)
        column = (item - n * groups) * Q
        others = tl.maximum(column - (dy_width - Q), 0)
        column -= others
        n = tl.minimum(n, samples - 1).to(tl.int64)
        x_column = column * STRIDE
        if depth is None:
            x_row = x_ptr + (n * x_sn + x_column * X_SW)
            dy_row = dy_ptr + (n * dy_sn + column * DY_SW)
        else:
            volume = n // planes
            z = front + (n - volume * planes)
            x_plane = (z * STRIDE + kd - KD // 2) * (height * x_sh)
            x_row = x_ptr + (volume * x_sn + x_plane + x_column * X_SW)
            dy_row = dy_ptr + (volume * dy_sn + z * (dy_height * dy_sh) + column * DY_SW)
        # The rows of dy before the newest: window[b * Q + q] belongs to kernel row kh + 1 + b
        window = ()
        for b in tl.static_range(R - 1):
            # A vector like `inside`: Triton 3.9's interpreter cannot combine a scalar comparison and a vector.
            row = tl.full((BLOCK,), low + P - kh - 1 - b, tl.int32)
            ptr = dy_row - (1 + b) * DH * dy_sh
            held = inside & (row >= 0) & (row < own)
            window = window + load_own(ptr, held, others, Q, EDGES, DY_SW, ROUND_DY)
        if STRIDE > 1:
            for _row in range(low, high):
                x = load_columns(x_row, x_column, width, inside, COUNT, -PW * DW, HELD, EDGES, X_SW, ROUND)
                newest = load_own(dy_row, inside, others, Q, EDGES, DY_SW, ROUND_DY)
                sums = add_products(sums, newest, x, Q, KW, DW, EDGES, STRIDE)
                if kh == P:
                    db = add_columns(db, newest, Q)
                x_row += x_sh * STRIDE
                dy_row += dy_sh
        elif R <= 2:
            # Only rows of dy inside the image are computed, and only one kernel row sums the bias, which would be 12 %
            # of the instructions for K 13. The older row is not needed after the newest is loaded: no moves.
            upper = sums[:KW]
            lower = sums[KW:]
            for t in range(low, high):
                x = load_columns(x_row, x_column, width, inside, COUNT, -PW * DW, HELD, EDGES, X_SW, ROUND)
                if R == 2:
                    if (t + P - kh > 0) & (kh + 1 < KH):
                        lower = add_products(lower, window, x, Q, KW, DW, EDGES, STRIDE)
                        if P % 2 == 1:
                            if kh + 1 == P:
                                db = add_columns(db, window, Q)
                if t + P - kh < own:
                    newest = load_own(dy_row, inside, others, Q, EDGES, DY_SW, ROUND_DY)
                    upper = add_products(upper, newest, x, Q, KW, DW, EDGES, STRIDE)
                    if P % R == 0:
                        if kh == P:
                            db = add_columns(db, newest, Q)
                    if R == 2:
                        window = newest
                x_row += x_sh * DH
                dy_row += dy_sh * DH
            sums = upper + lower
        else:
            for t in range(low, high):
                row = tl.full((BLOCK,), t + P - kh, tl.int32)
                newest = load_own(dy_row, inside & (row < own), others, Q, EDGES, DY_SW, ROUND_DY)
                dy = newest + window
                x = load_columns(x_row, x_column, width, None, COUNT, -PW * DW, HELD, EDGES, X_SW, ROUND)
                new = ()
                for b in tl.static_range(R):
                    new = new + add_products(sums[b * KW : (b + 1) * KW], dy[b * Q :], x, Q, KW, DW, EDGES, STRIDE)
                sums = new
                db = add_columns(db, dy[(P % R) * Q :], Q)
                window = dy[: (R - 1) * Q]
                x_row += x_sh * DH
                dy_row += dy_sh * DH

    # One partial sum per program and channel
    out = partials_ptr + kh * (KW * C)
    out += (tl.program_id(1) * parts + part).to(tl.int64) * ((KD * KH * KW + 1) * C)
    if depth is not None:
        out += kd * (KH * KW * C)
    for r in tl.static_range(R):
        put_row(out + r * KW * C, sums[r * KW : (r + 1) * KW], c, C, kh + r < KH, X_FIRST, BC, LANES, KW)
    if depth is None:
        put(out + (KH * KW - kh * KW) * C, db, c, C, kh == P // R * R, X_FIRST, BC, LANES)
    elif kd == KD // 2:
        last = (KD * KH - kd * KH - kh) * (KW * C)
        put(out + last, db, c, C, kh == P // R * R, X_FIRST, BC, LANES)


@triton.jit
def put_row(
    ptr,
    sums,
    c,
    C: tl.constexpr,
    wanted,
    CHANNELS_FIRST: tl.constexpr,
    BC: tl.constexpr,
    LANES: tl.constexpr,
    KW: tl.constexpr,
):
    """`put` for the sums of a kernel row: of long rows eight at a time, as each sum over threads takes two barriers."""
    EIGHTS: tl.constexpr = (KW + 7) // 8 if LANES > 1 and KW > 7 and not CHANNELS_FIRST else 0
    if EIGHTS > 0:
        padded = sums + sums[:7]  # not stored
        channel = tl.min(tl.reshape(c, (LANES, BC)), axis=0)[:, None]
        for i in tl.static_range(EIGHTS):
            # The last join is the last dimension: tap j is at j
            a = tl.join(tl.join(padded[i * 8], padded[i * 8 + 4]), tl.join(padded[i * 8 + 2], padded[i * 8 + 6]))
            b = tl.join(tl.join(padded[i * 8 + 1], padded[i * 8 + 5]), tl.join(padded[i * 8 + 3], padded[i * 8 + 7]))
            total = tl.sum(tl.reshape(tl.join(a, b), (LANES, BC, 8)), axis=0)
            tap = (i * 8 + tl.arange(0, 8))[None, :]
            mask = tl.where(wanted, (channel < C) & (tap < KW), False)
            tl.store(ptr + tap * C + channel, total, mask=mask)
    else:
        for i in tl.static_range(KW):
            put(ptr + i * C, sums[i], c, C, wanted, CHANNELS_FIRST, BC, LANES)


@triton.jit
def put(
    ptr,
    v,
    c,
    C: tl.constexpr,
    wanted,
    CHANNELS_FIRST: tl.constexpr,
    BC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum over the positions of the program and store one value per channel."""
    if LANES > 1:
        if CHANNELS_FIRST:
            v = tl.sum(tl.reshape(v, (BC, LANES)), axis=1)
            c = tl.min(tl.reshape(c, (BC, LANES)), axis=1)
        else:
            v = tl.sum(tl.reshape(v, (LANES, BC)), axis=0)
            c = tl.min(tl.reshape(c, (LANES, BC)), axis=0)
    mask = tl.where(wanted, c < C, False)
    tl.store(ptr + c, v, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(
    partials_ptr,
    dw_ptr,
    db_ptr,
    parts,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum partials (parts, KH * KW + 1, C) over the first dimension, in one order; DW: strides of (c, kh, kw)."""
    wait_for_previous(PDL)
    LENGTH: tl.constexpr = (KH * KW + 1) * C
    i = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    acc = tl.zeros((BLOCK_P, BLOCK_L), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        ptr = partials_ptr + rows[:, None].to(tl.int64) * LENGTH + i[None, :]
        acc += tl.load(ptr, mask=(rows < parts)[:, None] & (i < LENGTH)[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    tap, c = i // C, i % C
    if dw_ptr is not None:
        ptr = dw_ptr + c * DW[0] + (tap // KW) * DW[1] + (tap % KW) * DW[2]
        tl.store(ptr, total.to(dw_ptr.dtype.element_ty), mask=tap < KH * KW)
    if db_ptr is not None:
        tl.store(db_ptr + c, total.to(db_ptr.dtype.element_ty), mask=tap == KH * KW)
