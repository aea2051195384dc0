"""Find shapes at which this package is slower than eager PyTorch (channels_last) on this CPU.

    python benchmarks/cpu_sweep.py [--threads 2] [--shapes 1000] [--minutes 60] [--dtype fp32] [--seed 0]

A grid of every channel count, height, width and kernel size has 10^8 points. So shapes are taken along lines (every
C at a fixed image, every height and width at fixed C, every K), every other one at random. The two candidates run in
turn, and their fastest calls are compared. A shape that seems slower is measured again, for longer, before it counts.
Prints the median and the slowest shapes. ``--threads 1`` compares processor time, so that other processes, which take
turns on the CPU, do not count.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import nn

from convnext_kernels import DepthwiseConv2d, FusedConvNeXtBlock
from convnext_kernels.backends.cpu import native
from convnext_kernels.bench.timing import pinned, settle, steady_allocator
from convnext_kernels.bench.workloads import EagerBlock, EagerDwconv, initialise

ODD = (1, 3, *range(9, 130, 10), 33, 63, 65, 127, 255, 257, 385, 511, 769, 1001, 1023)
CHANNELS = sorted({*range(8, 1025, 8), *ODD})
SIDES = range(1, 97)
KERNELS = range(3, 32, 2)
SLOWER = 0.95  # of eager's speed: a difference up to 5 % is noise
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of the largest value: twice the rounding error


@dataclass(frozen=True)
class Shape:
    """One point: the op, (N, C, H, W) and the side of the convolution's kernel."""

    op: str  # dwconv or block
    n: int
    c: int
    h: int
    w: int
    k: int

    def __str__(self) -> str:
        return f"{self.op} {self.n}x{self.c}x{self.h}x{self.w} K{self.k}"


def lines() -> Iterator[Shape]:
    """Yield every C, every side and every K, with the others fixed."""
    for c in CHANNELS:
        yield Shape("dwconv", 1, c, 14, 14, 7)
        yield Shape("block", 1, c, 14, 14, 7)
    for side in SIDES:
        for c in (96, 192):
            yield Shape("dwconv", 1, c, side, side, 7)
        yield Shape("block", 1, 96, side, side, 7)
        yield Shape("dwconv", 1, 96, 56, side, 7)
        yield Shape("dwconv", 1, 96, side, 56, 7)
    for k in KERNELS:
        for c, side in ((96, 56), (192, 28), (384, 14), (768, 7), (100, 15)):
            yield Shape("dwconv", 1, c, side, side, k)
        yield Shape("block", 1, 96, 28, 28, k)


def points(seed: int) -> Iterator[Shape]:
    """Yield `lines` in random order, each followed by a random shape, then random shapes without end."""
    chance = random.Random(seed)
    known = list(dict.fromkeys(lines()))
    chance.shuffle(known)
    while True:
        if known:
            yield known.pop()
        op, k = chance.choice((("dwconv", chance.choice(KERNELS)), ("block", 7)))
        # As many small images as large ones, because fixed costs matter for small ones.
        h, w = (min(96, max(1, round(2 ** chance.uniform(0, 6.6)))) for _ in range(2))
        yield Shape(op, chance.choice((1, 1, 2, 8)), chance.choice(CHANNELS), h, w, k)


def modules(shape: Shape, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Eager PyTorch and ours, with the same weights."""
    if shape.op == "dwconv":
        eager, ours = EagerDwconv(shape.c, shape.k), DepthwiseConv2d(shape.c, shape.k)
    else:
        eager, ours = EagerBlock(shape.c, kernel=shape.k), FusedConvNeXtBlock(shape.c, kernel_size=shape.k)
    initialise(eager)
    ours.load_state_dict(eager.state_dict())
    return tuple(m.to(dtype).to(memory_format=torch.channels_last).eval() for m in (eager, ours))


def _fastest(function: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    function()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 50):
        start = clock()
        function()
        found.append(clock() - start)
    return min(found)


def measure(shape: Shape, dtype: torch.dtype, seconds: float, rounds: int) -> float:
    """Return eager's time over ours, of the fastest call of each in `rounds` rounds.

    Raises AssertionError if the results differ by more than TOLERANCE: wrong results get no time.
    """
    eager, ours = modules(shape, dtype)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    x = torch.randn(shape.n, shape.c, shape.h, shape.w).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected, found = eager(x).float(), ours(x).float()
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[dtype], f"{shape}: differs from eager by {error:.1e}"
        best = [float("inf")] * 2
        for _ in range(rounds):
            for i, module in enumerate((eager, ours)):
                settle()
                best[i] = min(best[i], _fastest(lambda module=module: module(x), seconds, clock))
    return best[0] / best[1]


def speed(ratio: float) -> str:
    """Return a ratio of `measure` in words."""
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def sweep(shapes: Iterator[Shape], dtype: torch.dtype, until: float) -> dict[Shape, float]:
    """Return the ratios of all shapes measured before `until` (time.perf_counter)."""
    found = {}
    for shape in shapes:
        if time.perf_counter() > until:
            break
        found[shape] = measure(shape, dtype, 0.005, 2)
        if found[shape] < 1.1:  # 5 ms are short: measure again where it matters
            found[shape] = measure(shape, dtype, 0.04, 5)
    return found


@click.command()
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--shapes", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.0, min_open=True), default=60.0, show_default=True, help="At most.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(threads: int, shapes: int, minutes: float, dtype: str, seed: int) -> None:
    """Print how many shapes were measured, how they compare with eager, and the slowest ones."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    with steady_allocator(), pinned():
        found = sweep(itertools.islice(points(seed), shapes), DTYPES[dtype], time.perf_counter() + 60 * minutes)
        slow = [shape for shape, ratio in found.items() if ratio < SLOWER]
        for shape in slow:  # again, because other processes can slow down a single measurement
            found[shape] = max(found[shape], measure(shape, DTYPES[dtype], 0.1, 7))
    worst = sorted(found.items(), key=lambda item: item[1])
    slow = [shape for shape, ratio in found.items() if ratio < SLOWER]
    click.echo(
        f"{dtype}, {native.isa()}, {threads} threads: {len(found)} shapes, "
        f"median {speed(statistics.median(found.values()))} than eager, {len(slow)} slower by more than 5 %"
    )
    for shape, ratio in worst[:10]:
        click.echo(f"  {speed(ratio)}  {shape}")
    click.echo(f"worst: {speed(worst[0][1])} than eager, {worst[0][0]}")


if __name__ == "__main__":
    main()
