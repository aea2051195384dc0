"""Candidates on tensor cores for large depthwise kernels (dwconv_toeplitz.py), and their predicted costs."""

from collections.abc import Iterator
from typing import NamedTuple

from convnext_kernels import tuning
from convnext_kernels.tuning import Candidate, Work

SMALLEST = 9  # side of the kernels; smaller ones multiply mostly zeros
MAX_PARTS = 64  # partial sums per weight
_ROWS = 16  # of a matmul that one instruction multiplies
# Registers of a thread, about, with which the compiler does not spill
_REGISTERS = 185
_WEIGHT_REGISTERS = 240
# Share of the peak that `mma.sync` reaches: on Hopper and Blackwell only `wgmma` and `tcgen05`, which have no batches,
# reach it.
_SHARE = 0.5
_HANDICAP = 1.25  # never timed: waiting for loads and barriers is not in the model


class Window(NamedTuple):
    """Columns of a tile."""

    out: int  # BN: of the result
    inside: int  # WIN: of x
    left: int  # of x before those of the result

    @property
    def length(self) -> int:
        """Of the shifted copies of a kernel row."""
        return self.inside + self.out - 8

    @property
    def first(self) -> int:
        """Position of a kernel row's middle in copy 0."""
        return self.left + self.out - 8


def window(width: int, kernel_w: int) -> Window | None:
    """The tile for images of this width: the whole row if it is short; None if the kernel reaches too far."""
    if width <= 16:
        return Window(16, 16, 0)
    if width <= 32:
        return Window(32, 32, 0)
    if kernel_w // 2 <= 8:
        return Window(16, 32, 8)
    return Window(32, 64, 16) if kernel_w // 2 <= 16 else None


class Tile(NamedTuple):
    """Sizes of a program: CB channels, BM groups of R rows; KB kernel rows of the weight gradient."""

    channels: int
    warps: int
    groups: int
    rows: int
    kernel_rows: int = 1

    def samples(self, batch: int) -> int:
        """NB: with more, fewer groups are of one sample, and more rows outside of the image can be left out."""
        return min(_ROWS, 1 << (batch - 1).bit_length())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _offered(height: int, width: int, kernel: tuple[int, int]) -> Window | None:
    return window(width, kernel[1]) if max(kernel) >= SMALLEST and height * width > 1 else None


def _shared_clocks(elements: float, passes: float) -> float:
    """Clocks in which shared memory and L1 take 16-bit elements, 128 bytes per clock."""
    return elements * 2 * passes / 128


def _issued(warps: int, instructions: float, clocks: float) -> float:
    """Instructions of a program, all threads: where shared memory is slower, as many as could be issued meanwhile."""
    return 32 * max(warps * instructions, 4 * clocks)


def forward_candidates(
    samples: int, channels: int, height: int, width: int, kernel: tuple[int, int], itemsize: int, gpu: tuning.Gpu
) -> Iterator[Candidate]:
    """Tiles of the forward pass and the input gradient."""
    w = _offered(height, width, kernel)
    if w is None:
        return
    reach = kernel[0] // 2
    elements = samples * channels * height * width
    copied = channels * (kernel[0] + 1) * 8 * w.length
    copies = Work(dram_bytes=2 * copied, programs=_ceil(copied, 1024), fp32_ops=16 * copied)
    for tile in (Tile(8, 8, 32, 2), Tile(16, 8, 16, 2), Tile(8, 8, 16, 4), Tile(8, 8, 64, 1), Tile(8, 8, 16, 2)):
        cb, warps, bm, r = tile[:4]
        own = cb // warps  # channels of a warp
        registers = own * (r * bm * w.out // 32 + (bm + w.out) * w.inside // 64) + 60
        shared = 2 * cb * (bm * w.inside + r * w.inside * w.out)
        nb = tile.samples(samples)
        gb = bm // nb
        if registers > _REGISTERS or shared > gpu.shared_bytes:
            continue
        starts = range(0, height, gb * r)
        steps = sum(min(r + reach, height - f) - max(-reach, -f - (gb - 1) * r) for f in starts)
        across = _ceil(channels, cb) * _ceil(width, w.out) * _ceil(samples, nb)
        programs = across * len(starts)
        loaded, matrix = cb * bm * w.inside, cb * w.inside * w.out
        products = own * r * (bm // _ROWS) * (w.out // 8) * (w.inside // 16)
        per_step = (1.6 * loaded + 0.5 * r * matrix) / (32 * warps) + products + 40
        clocks = _shared_clocks(loaded, 3) + _shared_clocks(r * matrix, 3)
        work = Work(
            dram_bytes=2 * elements * itemsize + 2 * copied,
            # of the copies a step reads one new kernel row, the others are in L1
            l2_bytes=across * steps * (loaded * itemsize + 2 * cb * 8 * w.length) + elements * itemsize,
            tensor_flops=2 * across * steps * r * cb * bm * w.inside * w.out / _SHARE,
            fp32_ops=across * steps * _issued(warps, per_step, clocks) + programs * 32 * warps * 200,
            programs=programs,
            ctas_per_sm=max(1, min(65536 // (registers * 32 * warps), gpu.shared_sm_bytes // (shared + 1024))),
            warps=warps,
        )
        config = {"CB": cb, "warps": warps, "NB": nb, "GB": gb, "R": r}
        yield Candidate(f"toeplitz-c{cb}-m{bm}-r{r}", config, (copies, work), _HANDICAP)


def weight_candidates(
    samples: int, channels: int, height: int, width: int, kernel: tuple[int, int], itemsize: int, gpu: tuning.Gpu
) -> Iterator[Candidate]:
    """Tiles of the weight gradient."""
    w = _offered(height, width, kernel)
    if w is None:
        return
    reach = kernel[0] // 2
    taps = kernel[0] * kernel[1]
    elements = samples * channels * height * width
    for tile in (Tile(8, 8, 16, 4, 4), Tile(8, 8, 16, 4, 2), Tile(8, 8, 16, 3, 2), Tile(8, 8, 16, 2, 2)):
        cb, warps, bm, r, kb = tile
        own = cb // warps
        registers = own * (kb * w.inside * w.out // 32 + 16 * r) + 60
        shared = 2 * cb * bm * (w.inside + r * w.out)
        nb = tile.samples(samples)
        gb = bm // nb
        if registers > _WEIGHT_REGISTERS or shared > gpu.shared_bytes:
            continue
        blocks = _ceil(kernel[0], kb)
        rows = [
            max(0, min(height, height + reach - k) - max(reach - k - kb + 1, 0) // r * r)
            for k in range(0, kernel[0], kb)
        ]
        tiles = _ceil(width, w.out) * _ceil(samples, nb) * sum(_ceil(of, gb * r) for of in rows)
        channel_blocks = _ceil(channels, cb)
        ctas = max(1, min(65536 // (registers * 32 * warps), gpu.shared_sm_bytes // (shared + 1024)))
        loaded = cb * bm * ((r + kb - 1) * w.inside + r * w.out)
        products = own * r * kb * (w.inside // 16) * (w.out // 8) * (bm // 16)
        per_tile = 1.6 * loaded / (32 * warps) + products + 80
        for waves in (1, 2, 4):
            most = min(MAX_PARTS, max(1, tiles // blocks))
            parts = max(1, min(most, gpu.sms * ctas * waves // (channel_blocks * blocks)))
            programs = channel_blocks * blocks * parts
            partials = 4 * parts * (taps + 1) * channels
            epilogue = own * kb * (3 * w.inside * w.out // 32 + 100) + 100
            work = Work(
                dram_bytes=2 * elements * itemsize + partials,
                l2_bytes=channel_blocks * tiles * loaded * itemsize + partials,
                tensor_flops=2 * channel_blocks * tiles * r * kb * cb * bm * w.inside * w.out / _SHARE,
                fp32_ops=channel_blocks * tiles * _issued(warps, per_tile, _shared_clocks(loaded, 3))
                + programs * 32 * warps * epilogue,
                programs=programs,
                ctas_per_sm=ctas,
                warps=warps,
            )
            finish = Work(
                dram_bytes=partials, l2_bytes=partials, programs=_ceil((taps + 1) * channels, 64), ctas_per_sm=8
            )
            config = {"CB": cb, "warps": warps, "NB": nb, "GB": gb, "R": r, "KB": kb, "parts": parts}
            yield Candidate(f"toeplitz-r{r}-kh{kb}-p{parts}", config, (work, finish), _HANDICAP)
