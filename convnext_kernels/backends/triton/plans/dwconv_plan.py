"""The choice of a depthwise kernel and its tile: the candidates and their predicted costs. Choices are cached.

Those on tensor cores are in dwconv_toeplitz_plan.py.

Instructions are counted as the kernels execute them (PTX): 4 per 16-bit value of x (address, load, widen, shift), one
per multiply-add, one per loop-carried accumulator that moves up a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from convnext_kernels import tuning
from convnext_kernels.backends.triton.plans import dwconv_toeplitz_plan
from convnext_kernels.tuning import Candidate, Work

BLOCK = 64  # threads of a program: they share nothing, and small programs fill the last wave better
SUMS_BLOCK = 128  # the same for the weight gradient
X2_COLUMNS = 4  # of a thread with two channels
MAX_PARTS = 352  # partial sums per weight: with more, writing and reading them costs more than idle multiprocessors
MAX_LINE_REGISTERS = 176  # by the count of values that a thread of dwconv_lines.py holds: with 178 sm_120 spills
_PER_LOAD = 4
_PER_WEIGHT = 3  # packed, fp32
_SCATTERED_LOAD = 12  # a load whose 32 lanes read 32 different lines takes about as long as this many instructions


class Problem(NamedTuple):
    """Everything that the choice depends on."""

    samples: int
    channels: int
    height: int
    width: int
    kernel_h: int
    kernel_w: int
    dilation_h: int
    dilation_w: int
    itemsize: int
    stride: int = 1
    depth: int = 1  # of a volume
    kernel_d: int = 1
    toeplitz: bool = False  # whether the kernels on tensor cores can serve the call
    x2: bool = False  # whether a thread can have two channels
    vector: int = 0  # channels of a thread of dwconv_lines.py; 0: those kernels cannot serve the call

    @property
    def volume(self) -> bool:
        """Whether there is a depth to go through."""
        return self.depth > 1 or self.kernel_d > 1

    @property
    def taps(self) -> int:
        """Of a plane of the kernel."""
        return self.kernel_h * self.kernel_w

    @property
    def few(self) -> bool:
        """Whether the weights of all taps fit in a thread's registers: 7x7, 1x51."""
        return self.taps <= 51


def on_tensor_cores(channels: int, dilation: tuple[int, int], stride: int, compute_dtype: torch.dtype) -> bool:
    """Whether the kernels on tensor cores can serve images in channels_last."""
    return channels % 8 == 0 and tuple(dilation) == (1, 1) and stride == 1 and compute_dtype.itemsize == 2


def two_channels(channels: int, stride: int, arch: int) -> bool:
    """Whether threads can have two channels of images in channels_last, with `fma.rn.f32x2`.

    From 110 on the assembler makes two instructions of it (ptxas of CUDA 12.9 and 13.0 for sm_120).
    """
    return arch in (100, 103) and channels % 2 == 0 and stride == 1


def line_channels(channels: int, kernel: tuple[int, int], stride: int, dtype: torch.dtype) -> int:
    """The most channels that a thread of dwconv_lines.py can have; 0 if there are several rows and columns."""
    if min(kernel) > 1 or stride > 1:
        return 0
    return 2 if dtype.itemsize == 2 and channels % 2 == 0 else 1


def line(p: Problem) -> Problem:
    """A kernel of one row or one column as one of one row: that of a column on the transposed image."""
    if p.kernel_w > 1:
        return p
    return p._replace(
        height=p.width,
        width=p.height,
        kernel_h=p.kernel_w,
        kernel_w=p.kernel_h,
        dilation_h=p.dilation_w,
        dilation_w=p.dilation_h,
    )


def taps_inside(size: int, side: int, dilation: int) -> int:
    """The number of taps inside the image, summed over the positions of one dimension."""
    radius = side // 2
    return sum(max(0, size - abs(k - radius) * dilation) for k in range(side))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _smaller(p: Problem) -> Problem:
    """With the size of the convolution's result."""
    depth, height, width = (_ceil(size, p.stride) for size in (p.depth, p.height, p.width))
    return p._replace(depth=depth, height=height, width=width)


def _strips(height: int, *counts: int) -> list[int]:
    """Numbers of strips of equal height, about these."""
    return sorted({_ceil(height, _ceil(height, s)) for s in counts})


def _sizes(rows: int) -> tuple[int, ...]:
    """Columns of a thread with a row of accumulators for each of `rows` kernel rows: what fits in its registers."""
    return (14, 7) if rows <= 3 else (7,) if rows <= 14 else (4,) if rows <= 25 else (2,)


def edges(p: Problem, q: int) -> str:
    """How groups of q columns meet the edges of the image: EDGES of the kernels.

    "image": one group is the image, and taps outside are not compiled. That saves 43 % of the multiply-adds of 7x7 on 7
    columns, 12 % on 14 and 6 % on 28, but such a kernel serves one width. "inside": for all widths from q on.
    """
    return "image" if p.stride == 1 and q == p.width and (q in (7, 14) or q <= 4 or p.kernel_w > 7) else "inside"


def _tiles(p: Problem, sizes: tuple[int, ...], widest: int = 14, waste: float = 1.15) -> Iterator[int]:
    """Columns per thread to choose from: few, because each is a kernel to compile for every number of channels.

    That are `sizes`; the image's width up to `widest`, where `edges` has a kernel for it; and 4, with few taps where
    groups of 7 have more than `waste` times the image's columns, with more where nothing else fits in the image.
    """
    for q in sizes:
        if q < p.width or (q == p.width and edges(p, q) == "inside"):
            yield q
    if p.width <= widest and edges(p, p.width) == "image":
        yield p.width
    narrow = 4 < p.width < 7 and (p.few or edges(p, p.width) == "inside")
    if narrow or (p.few and p.width >= 7 and _ceil(p.width, 7) * 7 > waste * p.width):
        yield 4


def _multiply_adds(p: Problem, q: int) -> int:
    """Multiply-adds of q columns with one kernel row; if the tile is as wide as the image only those inside."""
    return taps_inside(p.width, p.kernel_w, p.dilation_w) if edges(p, q) == "image" else q * p.kernel_w


def _columns(p: Problem, q: int) -> int:
    return p.width if edges(p, q) == "image" else q + (p.kernel_w - 1) * p.dilation_w


def _resident(registers: int, threads: int) -> int:
    """CTAs per multiprocessor for which there are registers."""
    return max(1, min(65536 // (max(registers, 32) * threads), 1536 // threads))


def _forward_work(
    p: Problem, lanes: int, rows: int, per_thread: float, q: int, read_rows: float, registers: int
) -> Work:
    elements = p.samples * p.channels * p.height * p.width
    programs = _ceil(lanes, BLOCK) * rows
    return Work(
        dram_bytes=2 * elements * p.itemsize,
        l2_bytes=elements * p.itemsize * (1 + read_rows * _columns(p, q) / q),
        fp32_ops=programs * BLOCK * per_thread,
        programs=programs,
        ctas_per_sm=_resident(registers, BLOCK),
        warps=BLOCK // 32,
    )


def forward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way that the forward pass (and the input gradient) can be computed."""
    if p.volume:
        yield from _volumes(p)
        return
    if p.stride > 1:
        yield from _rows(p, gpu.arch)
        return
    k = p.kernel_h
    if p.few and p.height <= 7 and p.width <= 7:
        lanes = p.samples * p.channels
        inside = taps_inside(p.height, k, p.dilation_h) * taps_inside(p.width, p.kernel_w, p.dilation_w)
        per_thread = inside + 8 * p.height * p.width + _SCATTERED_LOAD * p.taps
        work = _forward_work(p, lanes, 1, per_thread, p.width, 1, 128)
        yield Candidate("plane", {}, (work,))
    lines = sorted(_lines(p), key=_instructions) if p.vector else []
    yield from lines
    if p.few and not lines:
        for q in _tiles(p, _sizes(k), max(_sizes(k))):
            yield from _rolling(p, q, x2=False)
        if p.x2 and p.width >= X2_COLUMNS and k <= 7:
            yield from _rolling(p, X2_COLUMNS, x2=True)
    if not lines:
        yield from _rows(p, gpu.arch)
    if p.toeplitz:
        yield from dwconv_toeplitz_plan.forward_candidates(*p[:4], (k, p.kernel_w), p.itemsize, gpu)


def _rolling(p: Problem, q: int, x2: bool) -> Iterator[Candidate]:
    """A strip of rows per thread, q columns, with accumulators for all kernel rows."""
    k, d, channels = p.kernel_h, p.dilation_h, 2 if x2 else 1
    lanes = p.samples * p.channels // channels * _ceil(p.width, q)
    per_row = _PER_LOAD * _columns(p, q) + k * _multiply_adds(p, q) + (k - 1) * q + 5 * q + 10
    if x2:
        per_row = _two_channels(per_row + q, k * _multiply_adds(p, q))
    height = _ceil(p.height, d)
    for s in _strips(height, 1, 2, 3, 4, 6, 8, 14):
        rows = _ceil(height, s)
        looped = (height + (s - 1) * 2 * (k // 2)) / s
        per_thread = looped * per_row + channels * _SCATTERED_LOAD * p.taps + 5 * q * (k // 2) + 60
        registers = 16 + channels * (p.taps + k * q + _columns(p, q))
        work = _forward_work(p, lanes, s * d, per_thread, q, looped / rows, registers)
        config = {"Q": q, "strip": rows} | ({"X2": True} if x2 else {})
        yield Candidate(f"rolling-q{q}-s{s}" + "-x2" * x2, config, (work,))


def _two_channels(instructions: float, multiply_adds: float) -> float:
    """Time of a row of two channels.

    The lanes multiply and add as fast as two instructions would, but that leaves issue slots to the other instructions.
    """
    return max(instructions, 2 * multiply_adds)


def _line_tiles(p: Problem, held: int) -> Iterator[tuple[int, int, int, float]]:
    """(positions, channels, registers, instructions of one line) of a thread of dwconv_lines.py.

    p as `line` returns it; held: other values per position and channel. None where a dilated kernel reaches too far.
    """
    for vector in range(p.vector, 0, -1):
        found = False
        for q in _tiles(p, (28, 14, 7), 28):
            columns = _columns(p, q)
            registers = 24 + vector * (p.kernel_w + columns + held * q)
            if registers > MAX_LINE_REGISTERS:
                continue
            found = True
            # of a pair of 16-bit values one load and two instructions to widen both; an address per load at most
            yield q, vector, registers, columns * (2 + vector) + vector * _multiply_adds(p, q) + 10
        if found:
            return


def _instructions(candidate: Candidate) -> float:
    """Of a candidate's first kernel. Most lines wait for memory, and of equally fast candidates the first is taken."""
    return candidate.launches[0].fp32_ops


def _lines(p: Problem) -> Iterator[Candidate]:
    """Kernels of one row or one column: positions along the kernel's axis, lines one after the other."""
    p = line(p)
    for q, vector, registers, per_line in _line_tiles(p, 0):
        lanes = p.samples * p.channels // vector * _ceil(p.width, q)
        for s in _strips(p.height, 1, 2, 4, 7, 14, 28):
            strip = _ceil(p.height, s)
            per_thread = strip * (per_line + 4 * q) + _SCATTERED_LOAD * vector * p.taps + 60
            work = _forward_work(p, lanes, s, per_thread, q, 1, registers)
            yield Candidate(f"lines-q{q}-s{s}", {"Q": q, "strip": strip, "V": vector}, (work,))


def _rows(p: Problem, arch: int) -> Iterator[Candidate]:
    """One output row per thread, or two. With a stride one, for any width of the image.

    A launch of its own packs the weights, except of few taps: there the launch would cost more than scattered loads.
    """
    k, d = p.kernel_h, p.dilation_h
    packed = not p.few
    pack = (Work(dram_bytes=8 * p.taps * p.channels, programs=_ceil(p.taps * p.channels, 256)),) if packed else ()
    stride, p = p.stride, _smaller(p)
    meeting = taps_inside(p.height, k, d) / p.height
    if stride > 1:
        tiles = _strided_sizes(p.width)
    else:
        tiles = _tiles(p, (28, 14, 7), 32) if packed else _tiles(p, (28, 7), waste=2)
    for q in tiles:
        columns = _columns(p, q) if stride == 1 else q * stride + (p.kernel_w - 1) * p.dilation_w
        weights = min(p.kernel_w, 2 * ((p.width - 1) // p.dilation_w) + 1) if edges(p, q) == "image" else p.kernel_w
        lanes = p.samples * p.channels * _ceil(p.width, q)
        per_weight = _PER_WEIGHT if packed else _SCATTERED_LOAD
        for rows in (1, 2) if packed and stride == 1 else (1,):
            if rows == 2 and q == 28 and p.kernel_w > 13 and arch in (80, 120):  # spills 24 and 4 bytes with 31 columns
                continue
            per_row = _PER_LOAD * columns + per_weight * weights + rows * _multiply_adds(p, q) + 8
            turns = min(meeting + rows - 1, p.height)
            per_thread = turns * per_row + 5 * q * rows + 40
            programs = _ceil(_ceil(p.height, d), rows) * d if stride == 1 else p.height
            registers = 24 + q * rows + (weights // 2 if rows == 1 else weights)
            work = _forward_work(p, lanes, programs, per_thread, q, turns / rows, registers)
            config = {"Q": q, "pair": rows == 2, "pack": packed}
            name = f"rows-q{q}" + ("-pairs" if rows == 2 else "")
            yield Candidate(name, config, (*pack, work))
            if not p.x2 or q > 14 or edges(p, q) == "image":
                continue
            loads = _PER_LOAD * columns + per_weight * weights * (1 if packed else 2)
            per_row = _two_channels(loads + rows * _multiply_adds(p, q) + 8, rows * _multiply_adds(p, q))
            per_thread = turns * per_row + 5 * q * rows + 40
            registers = 24 + 2 * (q * rows + weights)
            work = _forward_work(p, lanes // 2, programs, per_thread, q, turns / rows, registers)
            yield Candidate(f"{name}-x2", config | {"X2": True}, (*pack, work))


def _volumes(p: Problem) -> Iterator[Candidate]:
    """Volumes: rows of one plane of the result, kernel planes one after the other. The weights are always packed."""
    taps = p.taps * p.kernel_d
    pack = Work(dram_bytes=8 * taps * p.channels, programs=_ceil(taps * p.channels, 256))
    small = _smaller(p)
    planes = taps_inside(small.depth, p.kernel_d, 1) / small.depth
    meeting = taps_inside(small.height, p.kernel_h, 1) / small.height
    for q in _tiles(p, (14, 7)) if p.stride == 1 else _strided_sizes(small.width):
        lanes = p.samples * p.channels * _ceil(small.width, q)
        columns = _columns(p, q) if p.stride == 1 else q * p.stride + p.kernel_w - 1
        for rows in (1, 2) if p.stride == 1 else (1,):
            per_row = _PER_LOAD * columns + _PER_WEIGHT * p.kernel_w + rows * _multiply_adds(p, q) + 8
            turns = planes * min(meeting + rows - 1, small.height)
            per_thread = turns * per_row + 5 * q * rows + 60
            programs = _ceil(small.height, rows) * small.depth
            registers = 32 + q * rows + 2 * p.kernel_w
            work = _forward_work(small, lanes, programs, per_thread, q, turns / rows, registers)
            work = replace(work, dram_bytes=work.dram_bytes * small.depth, l2_bytes=work.l2_bytes * small.depth)
            config = {"Q": q, "pair": rows == 2, "pack": True}
            yield Candidate(f"rows-q{q}" + ("-pairs" if rows == 2 else ""), config, (pack, work))


def _strided_sizes(width: int) -> tuple[int, ...]:
    """Columns of a thread: at most the image's."""
    return tuple(q for q in (14, 7) if q <= width) or (4 if width >= 4 else 2 if width >= 2 else 1,)


def columns(p: Problem, config: Mapping[str, object], gradient: bool) -> int:
    """Columns of a thread of the forward pass, or of the input gradient.

    The gradient's of a stride, with more columns to compute, is even in images of even width and odd in others, so that
    the last group of columns, which ends where the image does, begins at an even column like all others.
    """
    tile = int(config.get("Q", p.width))
    if p.stride == 1 or not gradient:
        return tile
    return min(2 * _ceil(tile, 2) + p.width % 2, p.width)


def _class(p: Problem) -> Problem:
    """The problem with its batch rounded up to a power of two, so that batch 7 uses the kernels of batch 8."""
    return p._replace(samples=1 << (p.samples - 1).bit_length())


@tuning.remembered
def forward(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate for the forward pass and the input gradient."""
    p = _class(p)
    return tuning.pick("dwconv_forward", p, tuple(forward_candidates(p, gpu)), gpu)


def weight_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way that the weight gradient can be computed."""
    lines = sorted(_line_partials(p, gpu), key=_instructions) if p.vector else []
    yield from lines or _partials(p, gpu)
    if p.toeplitz:
        yield from dwconv_toeplitz_plan.weight_candidates(*p[:4], p[4:6], p.itemsize, gpu)


def _partials(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Sums in registers: columns, kernel rows per program, strips, parts."""
    k, d = p.kernel_h, p.dilation_h
    lanes_c = min(32, 1 << (p.channels - 1).bit_length())
    height = _ceil(p.height, d)
    elements = p.samples * p.channels * p.depth * p.height * p.width
    seen = set()
    if p.stride > 1:  # rows of dy, which are neighbours for any dilation; their columns read twice as many of x
        p = _smaller(p)
        d, height, tiles = 1, p.height, _strided_sizes(p.width)
    else:
        tiles = _tiles(p, _sizes(k), max(_sizes(k)), waste=1.3) if p.few else _tiles(p, (28, 14, 7), 28)
    for q in tiles:
        several = (k, _ceil(k, 2), 4, 3, 2, 1) if not p.few or k > 14 else (k, 2) if q > 4 else (k,)
        for kernel_rows in several if p.stride == 1 else (1,):
            registers = 16 + kernel_rows * (p.kernel_w + q) + min(_columns(p, q), q + 12)
            # Pairs of rows may take more: they halve the loads, and 31x31 on 28 columns compiles without a spill.
            most = 164 if kernel_rows == 2 and edges(p, q) == "image" else 144
            if kernel_rows > k or (kernel_rows > 1 and registers > most) or (q, kernel_rows) in seen:
                continue
            seen.add((q, kernel_rows))
            kernel_blocks = _ceil(k, kernel_rows) * p.kernel_d
            groups = p.samples * p.depth * _ceil(p.width, q)
            channel_blocks = _ceil(p.channels, lanes_c)
            ctas = _resident(registers, SUMS_BLOCK)
            own = kernel_rows * p.kernel_w  # sums of a thread
            per_row = (_PER_LOAD + 1) * (_columns(p, q) + q) + kernel_rows * _multiply_adds(p, q) + q + 10
            if kernel_rows <= 2:  # rows outside of the image are skipped; half a row is added at either end
                meeting = min(1.0, taps_inside(p.height, k, d) / (k * p.height) + 0.5 / p.height)
            else:  # rows of dy move up
                meeting, per_row = 1.0, per_row + kernel_rows * q
            prologue = 5 * (kernel_rows - 1) * q + 40
            for s in _strips(height, 1, 2, 4, 7, 14):
                for waves in (1, 2, 4):
                    wanted = gpu.sms * ctas * waves // (channel_blocks * kernel_blocks * s * d)
                    parts = max(1, min(wanted, _ceil(groups * lanes_c, SUMS_BLOCK), MAX_PARTS // (s * d)))
                    programs = channel_blocks * parts * kernel_blocks * s * d
                    turns = _ceil(groups * lanes_c, parts * SUMS_BLOCK)
                    per_thread = turns * (meeting * _ceil(height, s) * per_row + prologue) + 14 * own + 80
                    works = _sums(p, elements, kernel_blocks, q, parts * s * d, programs, per_thread, ctas)
                    config = {"Q": q, "R": kernel_rows, "strip": _ceil(height, s), "parts": parts, "BC": lanes_c}
                    yield Candidate(f"partials-q{q}-kh{kernel_rows}-s{s}-p{parts}", config, works)


def _line_partials(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """What `_partials` offers, for a kernel of one row or one column."""
    p = line(p)
    elements = p.samples * p.channels * p.height * p.width
    for q, vector, registers, per_line in _line_tiles(p, 1):
        vectors = p.channels // vector
        lanes_c = min((32, 16), key=lambda lanes: _ceil(vectors, lanes) * lanes)  # with the fewest idle ones
        lanes_c = min(lanes_c, 1 << (vectors - 1).bit_length())
        groups = p.samples * _ceil(p.width, q)
        channel_blocks = _ceil(vectors, lanes_c)
        ctas = _resident(registers, SUMS_BLOCK)
        for s in _strips(p.height, 1, 2, 4, 7, 14):
            for waves in (1, 2, 4):
                wanted = gpu.sms * ctas * waves // (channel_blocks * s)
                parts = max(1, min(wanted, _ceil(groups * lanes_c, SUMS_BLOCK), MAX_PARTS // s))
                turns = _ceil(groups * lanes_c, parts * SUMS_BLOCK)
                strip = _ceil(p.height, s)
                per_thread = turns * (strip * (per_line + q * (2 + 2 * vector)) + 40) + 14 * vector * p.taps + 80
                works = _sums(p, elements, 1, q, parts * s, channel_blocks * parts * s, per_thread, ctas)
                config = {"Q": q, "strip": strip, "parts": parts, "BC": lanes_c, "V": vector}
                yield Candidate(f"lines-q{q}-s{s}-p{parts}", config, works)


def _sums(
    p: Problem, elements: int, walks: int, q: int, parts: int, programs: int, per_thread: float, ctas: int
) -> tuple[Work, Work]:
    """Partial sums of `elements` values, each loaded in so many walks, and the addition of the `parts`."""
    sums = (p.taps * p.kernel_d + 1) * p.channels
    partials = 4 * parts * sums
    work = Work(
        dram_bytes=2 * elements * p.itemsize + partials,
        l2_bytes=elements * p.itemsize * walks * (1 + _columns(p, q) / q) + partials,
        fp32_ops=programs * SUMS_BLOCK * per_thread,
        programs=programs,
        ctas_per_sm=ctas,
        warps=SUMS_BLOCK // 32,
    )
    return work, Work(dram_bytes=partials, l2_bytes=partials, programs=_ceil(sums, 64), ctas_per_sm=8)


@tuning.remembered
def weight(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate for the weight gradient."""
    p = _class(p)
    return tuning.pick("dwconv_weight", p, tuple(weight_candidates(p, gpu)), gpu)
