"""Kernels of the depthwise convolution with one row or one column (1xK, Kx1, sequences) on channels_last tensors.

As in dwconv_forward.py and dwconv_wgrad.py, where the formulas and the tile of a thread are, but along one axis of the
image: the columns of a row or, for a kernel of one column, the rows of a column. A thread goes from line to line with
the weights in registers, and it has two neighbouring channels of 16 bits, which are one load and one store of 32 bits:
with only K multiply-adds per output, loads and stores would cost more than these.
"""

# Inside kernels, tuples support only +, and conditions at compile time only plain ifs.
# ruff: noqa: SIM108

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.dwconv_forward import _PTX, COUNTS, load
from convnext_kernels.backends.triton.kernels.dwconv_wgrad import add_columns, add_products, put


@triton.jit
def widened(bits, element: tl.constexpr):
    """Two 16-bit values in 32 bits -> both as fp32."""
    if element == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True), (bits & -65536).to(tl.float32, bitcast=True)
    if _PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }",
            "=f,=f,r",
            [bits],
            (tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def narrowed(a, b, element: tl.constexpr):
    """Two fp32 values -> both in 32 bits."""
    if _PTX:
        if element == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, is_pure=True, pack=1
            )
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, is_pure=True, pack=1
        )
    low = a.to(element).to(tl.int16, bitcast=True).to(tl.int32)
    high = b.to(element).to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 65535) | (high << 16)


@triton.jit
def load_channels(ptr, mask, V: tl.constexpr, ROUND: tl.constexpr):
    """V neighbouring channels as fp32; 0 where masked."""
    if V == 1:
        values = (load(ptr, mask, ROUND),)
    else:
        pair = ptr.to(tl.pointer_type(tl.int32))
        if mask is None:
            bits = tl.load(pair)
        else:
            bits = tl.load(pair, mask=mask, other=0)
        values = widened(bits, ptr.dtype.element_ty)
    return values


@triton.jit
def load_line(
    ptr,
    step,
    position,
    length,
    inside,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    Q: tl.constexpr,
    EDGES: tl.constexpr,
    V: tl.constexpr,
    ROUND: tl.constexpr,
):
    """What `load_columns` does, along a line whose positions are `step` apart, for V channels: V times COUNT values."""
    one = ()
    two = ()
    for j in tl.static_range(COUNT):
        mask = inside
        if FIRST + j < 0:
            mask = position >= -(FIRST + j)
            if inside is not None:
                mask = mask & inside
        if FIRST + j >= Q:
            mask = position < length - (FIRST + j)
            if inside is not None:
                mask = mask & inside
        if EDGES == "image" and (FIRST + j < 0 or FIRST + j >= Q):
            one = one + (0.0,)
            two = two + (0.0,)
        else:
            values = load_channels(ptr, mask, V, ROUND)
            one = one + values[:1]
            two = two + values[1:]
        ptr += step
    if V == 1:
        return one
    return one + two


@triton.jit
def along(height, width, C: tl.constexpr, COLUMN: tl.constexpr, Q: tl.constexpr, EDGES: tl.constexpr):
    """(positions of a line, lines, elements from position to position, from line to line)."""
    if COLUMN:
        length = height
        lines = width
        step = width.to(tl.int64) * C
        line_step = C
    else:
        length = width
        lines = height
        step = C
        line_step = width * C
    if EDGES == "image":
        length = Q
        if not COLUMN:
            line_step = Q * C
    return length, lines, step, line_step


@triton.jit(do_not_specialize=COUNTS)
def lines_kernel(
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
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT: tl.constexpr,
    COLUMN: tl.constexpr,
    FLIP: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Q positions of each line of a strip of lines, V channels.

    Grid (lanes, strips). COLUMN: a kernel of one column, not of one row. WEIGHT: strides of (c, k). With V = 2 all
    tensors but the weight and the bias have the same dtype of 16 bits, and C, sample strides and addresses are even.
    """
    P: tl.constexpr = K // 2
    length, lines, step, line_step = along(height, width, C, COLUMN, Q, EDGES)
    groups = (length + Q - 1) // Q
    COUNT: tl.constexpr = Q + (K - 1) * D
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = lane // (C // V)
    c = (lane - rest * (C // V)) * V
    n = (rest.to(tl.uint32) // tl.cast(groups, tl.uint32)).to(tl.int32)
    position = tl.minimum((rest - n * groups) * Q, length - Q)
    inside = n < samples
    n = tl.minimum(n, samples - 1).to(tl.int64)  # threads too many load what the last sample's do, and store nothing
    first = tl.program_id(1) * strip
    at = c + position.to(tl.int64) * step + first.to(tl.int64) * line_step
    x_ptr += n * x_sn + at - P * D * step
    y_ptr += n * y_sn + at
    if residual_ptr is not None:
        residual_ptr += n * residual_sn + at
    SIGN: tl.constexpr = -1 if FLIP else 1
    w_ptr = weight_ptr + c * WEIGHT[0]
    if FLIP:
        w_ptr += (K - 1) * WEIGHT[1]
    w = ()
    for i in tl.static_range(V * K):
        w = w + (load(w_ptr + ((i // K) * WEIGHT[0] + (i % K) * (SIGN * WEIGHT[1])), None, ROUND_WEIGHT),)
    bias = ()
    for v in tl.static_range(V):
        if bias_ptr is None:
            bias = bias + (tl.zeros((BLOCK,), tl.float32),)
        else:
            bias = bias + (tl.load(bias_ptr + c + v).to(tl.float32),)

    for _ in range(first, tl.minimum(first + strip, lines)):
        x = load_line(x_ptr, step, position, length, None, COUNT, -P * D, Q, EDGES, V, ROUND)
        to = y_ptr
        added = residual_ptr
        for q in tl.static_range(Q):
            start = bias
            if residual_ptr is not None and V == 2:  # 16 bits: fp32 sums may begin with the residual
                start = widened(tl.load(added.to(tl.pointer_type(tl.int32))), y_ptr.dtype.element_ty)
                if bias_ptr is not None:
                    start = (start[0] + bias[0], start[1] + bias[1])
            sums = ()
            for v in tl.static_range(V):
                a = start[v]
                for k in tl.static_range(K):
                    if EDGES != "image" or (q + (k - P) * D >= 0 and q + (k - P) * D < Q):
                        a += w[v * K + k] * x[v * COUNT + q + k * D]
                sums = sums + (a,)
            if V == 1:
                a = sums[0]
                if residual_ptr is not None:
                    a += tl.load(added, mask=inside, other=0.0).to(tl.float32)
                tl.store(to, a.to(y_ptr.dtype.element_ty), mask=inside)
            else:
                both = narrowed(sums[0], sums[1], y_ptr.dtype.element_ty)
                tl.store(to.to(tl.pointer_type(tl.int32)), both, mask=inside)
            to += step
            if residual_ptr is not None:
                added += step
        x_ptr += line_step
        y_ptr += line_step
        if residual_ptr is not None:
            residual_ptr += line_step


@triton.jit
def own_line(ptr, step, inside, others, Q: tl.constexpr, EDGES: tl.constexpr, V: tl.constexpr, ROUND: tl.constexpr):
    """What `load_own` does, along a line, for V channels: V times Q values."""
    one = ()
    two = ()
    if EDGES == "inside":
        others = tl.where(inside, others, Q)  # so that one comparison is the mask of a position
    for j in tl.static_range(Q):
        if EDGES == "inside":
            mask = others <= j
        else:
            mask = inside
        values = load_channels(ptr, mask, V, ROUND)
        one = one + values[:1]
        two = two + values[1:]
        ptr += step
    return one + two


@triton.jit(do_not_specialize=[*COUNTS, "dy_sn", "parts"])
def line_partials_kernel(
    dy_ptr,
    x_ptr,
    partials_ptr,
    samples,
    dy_sn,
    x_sn,
    height,
    width,
    parts,
    strip,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    COLUMN: tl.constexpr,
    ROUND_DY: tl.constexpr,
    ROUND: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    EDGES: tl.constexpr,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums (strips * parts, K + 1, C) of the weight gradient and, last, of the bias gradient.

    Grid (channel blocks * parts, strips); a program has V * BC channels and BLOCK / BC positions, as `partials_kernel`.
    """
    P: tl.constexpr = K // 2
    length, lines, step, line_step = along(height, width, C, COLUMN, Q, EDGES)
    groups = (length + Q - 1) // Q
    COUNT: tl.constexpr = Q + (K - 1) * D
    LANES: tl.constexpr = BLOCK // BC
    BLOCKS: tl.constexpr = (C + V * BC - 1) // (V * BC)
    lane = tl.arange(0, BLOCK)
    c = (tl.program_id(0) % BLOCKS * BC + lane % BC) * V
    channel = tl.minimum(c, C - V)
    part = tl.program_id(0) // BLOCKS
    first = tl.program_id(1) * strip
    end = tl.minimum(first + strip, lines)
    sums = ()
    for _ in tl.static_range(V * (K + 1)):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    for start in range(part * LANES, samples * groups, parts * LANES):
        item = start + lane // BC
        inside = item < samples * groups
        n = (item.to(tl.uint32) // tl.cast(groups, tl.uint32)).to(tl.int32)
        position = (item - n * groups) * Q
        others = tl.maximum(position - (length - Q), 0)
        position -= others
        n = tl.minimum(n, samples - 1).to(tl.int64)
        at = channel + position.to(tl.int64) * step + first.to(tl.int64) * line_step
        x_line = x_ptr + (n * x_sn + at - P * D * step)
        dy_line = dy_ptr + (n * dy_sn + at)
        for _line in range(first, end):
            x = load_line(x_line, step, position, length, inside, COUNT, -P * D, Q, EDGES, V, ROUND)
            dy = own_line(dy_line, step, inside, others, Q, EDGES, V, ROUND_DY)
            products = ()
            biases = ()
            for v in tl.static_range(V):
                own = dy[v * Q : (v + 1) * Q]
                products = products + add_products(
                    sums[v * K : (v + 1) * K], own, x[v * COUNT : (v + 1) * COUNT], Q, K, D, EDGES, 1
                )
                biases = biases + (add_columns(sums[V * K + v], own, Q),)
            sums = products + biases
            x_line += line_step
            dy_line += line_step

    out = partials_ptr + (tl.program_id(1) * parts + part).to(tl.int64) * ((K + 1) * C)
    for v in tl.static_range(V):
        for k in tl.static_range(K):
            put(out + k * C, sums[v * K + k], c + v, C, True, False, BC, LANES)
        put(out + K * C, sums[V * K + v], c + v, C, True, False, BC, LANES)
