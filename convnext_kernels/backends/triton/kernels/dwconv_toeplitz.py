"""Large depthwise kernels on tensor cores: every kernel row is a matmul with a banded Toeplitz matrix.

    T[c, kh][i, w] = weight[c, kh, i - w + PW]
    y[n, c, h, w] = bias[c] + sum_kh,i x[n, c, h + kh - P, i] * T[c, kh][i, w]
    G[c, kh][i, j] = sum_n,h x[n, c, h + kh - P, i] * dy[n, c, h, j],  dw[c, kh, kw] = sum_j G[c, kh][j + kw - PW, j]

with P = KH // 2, PW = KW // 2. The input gradient is the second over dy, with the kernel turned (FLIP). i runs over a
window of WIN columns of x, from LEFT columns before the BN columns of the result on. An image of up to 32 columns is
one window. Most of T is zero, but tensor cores multiply so much faster that this does not matter. It does where x is
inf or NaN: the result is NaN in all columns whose window has that pixel, not only in those that the kernel reaches.

The channel is the batch of the matmuls, so warps have channels of their own. The rows of a matmul are BM groups of R
neighbouring rows: GB groups of each of NB samples. A row of x that has been loaded, and transposed in shared memory, is
multiplied for all R rows of its group, each with the T of another kernel row. (With neighbouring rows of an image as
rows of the matmul, every kernel row would need x again, moved by one row, which is between threads.)

Bytes per pixel with 16-bit elements: as `dwconv.py` says, and those of T. `copies_kernel` writes eight copies of every
kernel row between zeros, copy s moved by s columns: then every column of T is vectors of eight elements of one copy,
and it takes C * (KH + 1) * 8 * (WIN + BN - 8) elements. The last kernel row is zero. It stands for kernel rows that do
not exist, because masked loads of T would take more instructions.

Counted as executed PTX on sm_90, instructions per 32 outputs, here and with one thread per output
(`proofs/records/triton_counts.md`): see docs/triton_kernels.md.
"""

# Inside kernels, tuples support only +, and conditions at compile time only plain ifs.
# ruff: noqa: SIM102, SIM108

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous


@triton.jit
def copies_kernel(
    weight_ptr,
    copies_ptr,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    LENGTH: tl.constexpr,
    FIRST: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """(C, 1, KH, KW) -> (C, KH + 1, 8, LENGTH), rounded: copy s has tap kw at FIRST + s + kw - KW // 2."""
    wait_for_previous(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i % LENGTH
    shift = i // LENGTH % 8
    kh = i // (8 * LENGTH) % (KH + 1)
    c = i // (8 * LENGTH * (KH + 1))
    kw = at - FIRST - shift + KW // 2
    held = (c < C) & (kh < KH) & (kw >= 0) & (kw < KW)
    if FLIP:
        kh = KH - 1 - kh
        kw = KW - 1 - kw
    w = tl.load(weight_ptr + c * WEIGHT[0] + kh * WEIGHT[1] + kw * WEIGHT[2], mask=held, other=0.0)
    tl.store(copies_ptr + i, w.to(copies_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def load(ptr, mask, ROUND: tl.constexpr):
    """A tile in the compute dtype; 0 where masked."""
    v = tl.load(ptr, mask=mask, other=0.0)
    if ROUND is not None:
        v = v.to(ROUND)
    return v


@triton.jit(do_not_specialize=["samples", "height", "width"])
def toeplitz_kernel(
    x_ptr,
    copies_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    samples,
    x_sn,
    y_sn,
    residual_sn,
    height,
    width,
    C: tl.constexpr,
    KH: tl.constexpr,
    LENGTH: tl.constexpr,
    FIRST: tl.constexpr,
    ROUND: tl.constexpr,
    WIN: tl.constexpr,
    LEFT: tl.constexpr,
    BN: tl.constexpr,
    CB: tl.constexpr,
    NB: tl.constexpr,
    GB: tl.constexpr,
    R: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns of GB groups of R rows of NB samples, CB channels.

    Grid (channel blocks, column blocks * row blocks, sample blocks).
    """
    wait_for_previous(PDL)
    P: tl.constexpr = KH // 2
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    column_blocks = tl.cdiv(width, BN)
    column = tl.program_id(1) % column_blocks * BN
    first = tl.program_id(1) // column_blocks * (GB * R)
    m = tl.arange(0, NB * GB)
    n = tl.program_id(2) * NB + m // GB
    row = first + m % GB * R  # of the result, the first of its group
    i = tl.arange(0, WIN)
    j = tl.arange(0, BN)
    x_column = column - LEFT + i
    held = (c < C)[:, None, None] & (n < samples)[None, :, None]
    x_held = held & ((x_column >= 0) & (x_column < width))[None, None, :]
    pixel = row.to(tl.int64) * (width * C)
    x_ptr += (n.to(tl.int64) * x_sn + pixel)[None, :, None] + (x_column * C)[None, None, :] + c[:, None, None]
    channel = tl.minimum(c, C - 1).to(tl.int64)
    matrix = i[:, None] + (FIRST - LEFT + j % 8 * LENGTH - j // 8 * 8)[None, :]
    copies_ptr += (channel * ((KH + 1) * 8 * LENGTH))[:, None, None] + matrix[None, :, :]
    sums = ()
    for _ in tl.static_range(R):
        total = tl.zeros((CB, NB * GB, BN), tl.float32)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + tl.minimum(c, C - 1)).to(tl.float32)[:, None, None]
        sums = sums + (total,)

    # Row of x minus first row of the group. Those outside of the image for all groups are left out.
    low = tl.maximum(-P, -first - (GB - 1) * R)
    high = tl.minimum(R + P, height - first)
    for s in range(low, high):
        inside = (row + s >= 0) & (row + s < height)
        x = load(x_ptr + tl.cast(s, tl.int64) * (width * C), x_held & inside[None, :, None], ROUND)
        new = ()
        for r in tl.static_range(R):
            kh = s - r + P
            t = tl.load(copies_ptr + tl.where((kh >= 0) & (kh < KH), kh, KH) * (8 * LENGTH), cache_modifier=".ca")
            new = new + (tl.dot(x, t, sums[r]),)
        sums = new

    y_column = column + j
    y_held = held & (y_column < width)[None, None, :]
    at = pixel[None, :, None] + (y_column * C)[None, None, :] + c[:, None, None]
    for r in tl.static_range(R):
        mask = y_held & (row + r < height)[None, :, None]
        value = sums[r]
        if residual_ptr is not None:
            where = residual_ptr + (n.to(tl.int64) * residual_sn)[None, :, None] + at
            value += tl.load(where + r * (width * C), mask=mask, other=0.0).to(tl.float32)
        where = y_ptr + (n.to(tl.int64) * y_sn)[None, :, None] + at
        tl.store(where + r * (width * C), value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "height", "width", "parts"])
def toeplitz_partials_kernel(
    dy_ptr,
    x_ptr,
    partials_ptr,
    samples,
    dy_sn,
    x_sn,
    height,
    width,
    parts,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROUND_DY: tl.constexpr,
    ROUND: tl.constexpr,
    WIN: tl.constexpr,
    LEFT: tl.constexpr,
    BN: tl.constexpr,
    TAPS: tl.constexpr,
    CB: tl.constexpr,
    NB: tl.constexpr,
    GB: tl.constexpr,
    R: tl.constexpr,
    KB: tl.constexpr,
    PDL: tl.constexpr,
):
    """KB kernel rows, CB channels: G over every `parts`-th tile, then the sums of its diagonals.

    Grid (channel blocks, kernel row blocks, parts). A tile has BN columns of GB groups of R rows of dy, of NB samples.
    Groups whose rows of x are all outside of the image are left out. TAPS: KW or more, a power of two. Partial sums
    (parts, KH * KW + 1, C), the bias gradient last, as `partials_kernel` writes them.
    """
    wait_for_previous(PDL)
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    kh = tl.program_id(1) * KB
    part = tl.program_id(2)
    m = tl.arange(0, NB * GB)
    i = tl.arange(0, WIN)
    j = tl.arange(0, BN)
    # Rows of dy that meet a row of x inside
    first = tl.maximum(P - kh - (KB - 1), 0) // R * R
    rows = tl.maximum(tl.minimum(height, height + P - kh) - first, 0)
    row_blocks = tl.cdiv(rows, GB * R)
    column_blocks = tl.cdiv(width, BN)
    tiles = row_blocks * column_blocks * tl.cdiv(samples, NB)
    sums = ()
    for _ in tl.static_range(KB):
        sums = sums + (tl.zeros((CB, WIN, BN), tl.float32),)
    db = tl.zeros((CB, BN), tl.float32)
    for tile in range(part, tiles, parts):
        column = tile % column_blocks * BN
        block = tile // column_blocks
        n = block // row_blocks * NB + m // GB
        row = first + block % row_blocks * (GB * R) + m % GB * R
        dy_column = column + j
        x_column = column - LEFT + i
        pixel = row.to(tl.int64) * (width * C)
        sample = n.to(tl.int64)
        held = (c < C)[:, None, None] & ((n < samples)[:, None] & (dy_column < width)[None, :])[None, :, :]
        dy_tile = dy_ptr + (sample * dy_sn + pixel)[None, :, None] + (dy_column * C)[None, None, :] + c[:, None, None]
        dy = ()
        for r in tl.static_range(R):
            inside = held & (row + r < height)[None, :, None]
            dy = dy + (load(dy_tile + r * (width * C), inside, ROUND_DY),)
        if kh <= P:
            if kh + KB > P:  # one kernel row block sums the bias; it has all rows
                for r in tl.static_range(R):
                    db += tl.sum(dy[r].to(tl.float32), axis=1)
        x_held = (n < samples)[:, None] & ((x_column >= 0) & (x_column < width))[None, :]
        x_held = (c < C)[:, None, None] & x_held[None, :, :]
        x_tile = x_ptr + (sample * x_sn + pixel)[None, :, None] + (x_column * C)[None, None, :] + c[:, None, None]
        x_tile += tl.cast(kh - P, tl.int64) * (width * C)
        for s in tl.static_range(R + KB - 1):
            x_row = row + kh - P + s
            inside = x_held & ((x_row >= 0) & (x_row < height))[None, :, None]
            x = tl.permute(load(x_tile + s * (width * C), inside, ROUND), (0, 2, 1))
            new = ()
            for b in tl.static_range(KB):
                if s - b >= 0 and s - b < R:
                    new = new + (tl.dot(x, dy[s - b], sums[b]),)
                else:
                    new = new + (sums[b],)
            sums = new

    out = partials_ptr + tl.cast(part, tl.int64) * ((KH * KW + 1) * C)
    kw = tl.arange(0, TAPS)
    at = kw[:, None] + (LEFT - PW + j)[None, :]  # row of G
    held = (at >= 0) & (at < WIN)
    at = tl.broadcast_to(tl.minimum(tl.maximum(at, 0), WIN - 1)[None, :, :], (CB, TAPS, BN))
    for b in tl.static_range(KB):
        diagonals = tl.where(held[None, :, :], tl.gather(sums[b], at, axis=1), 0.0)
        dw = tl.sum(diagonals, axis=2)
        mask = (c < C)[:, None] & ((kw < KW) & (kh + b < KH))[None, :]
        tl.store(out + ((kh + b) * KW + kw)[None, :] * C + c[:, None], dw, mask=mask)
    if kh <= P:
        if kh + KB > P:
            tl.store(out + KH * KW * C + c, tl.sum(db, axis=1), mask=c < C)
