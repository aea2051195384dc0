"""Find shapes at which this package is slower than eager PyTorch (channels_last) on this CPU.

    python benchmarks/cpu_sweep.py [--threads 2] [--shapes 1000] [--minutes 60] [--dtype fp32] [--seed 0]

A grid of every channel count, height, width and kernel size has 10^8 points. So shapes are drawn at random, every other
one with the numbers of ConvNeXt-T's stages but for one. The two candidates run in turn, and their fastest calls are
compared. A shape that seems slower is measured again, for longer, before it counts. Prints the median and the slowest
shapes. ``--threads 1`` compares processor time, so that other processes, which take turns on the CPU, do not count.
"""

import itertools
import random
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import click
import torch

from convnext_kernels.backends.cpu import native
from convnext_kernels.bench import workloads
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.tables import speedup
from convnext_kernels.bench.timing import interleave, pinned, steady_allocator
from convnext_kernels.cli import options

ODD = (1, 3, *range(9, 130, 10), 33, 63, 65, 127, 255, 257, 385, 511, 769, 1001, 1023)
CHANNELS = sorted({*range(8, 1025, 8), *ODD})
KERNELS = range(3, 32, 2)
# With fewer channels PyTorch 2.14 can hang in bf16: oneDNN works for more than an hour on its kernel for 8 or 9
# channels, K 15 and a width of 85.
ONEDNN_HANGS = 16
SLOWER = 0.95  # of eager's speed: a difference up to 5 % is noise
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of the largest value: twice the rounding error


class Shape(NamedTuple):
    """One point: the op, (N, C, H, W) and the side of the convolution's kernel."""

    op: str  # dwconv or block
    n: int
    c: int
    h: int
    w: int
    k: int

    def __str__(self) -> str:
        return f"{self.op} {self.n}x{self.c}x{self.h}x{self.w} K{self.k}"


def shapes(seed: int) -> Iterator[Shape]:
    """Yield shapes without end: one of ConvNeXt-T's with one number drawn at random, then one of random numbers."""
    chance = random.Random(seed)

    def side() -> int:
        return min(96, max(1, round(2 ** chance.uniform(0, 6.6))))  # fixed costs matter for small images

    draw = {"h": side, "w": side, "n": lambda: chance.choice((1, 1, 2, 8))}
    draw |= {"c": lambda: chance.choice(CHANNELS), "k": lambda: chance.choice(KERNELS)}
    while True:
        c, size = chance.choice(STAGES)
        for names in (chance.sample(list(draw), 1), draw):
            numbers = {"n": 1, "c": c, "h": size, "w": size, "k": 7} | {name: draw[name]() for name in names}
            yield Shape(chance.choice(("dwconv", "block")), **numbers)


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> float:
    """Return eager's time over ours, of the fastest call of each in `rounds` rounds of bursts.

    Raises AssertionError if the results differ by more than TOLERANCE: wrong results get no time.
    """
    kernel = (False, shape.k) if shape.op == "block" else (shape.k,)
    workload = workloads.op(*shape[:5], *kernel)
    form = {"dtype": dtype, "memory_format": torch.channels_last}
    eager, ours, x = (each.to(**form) for each in (workload.eager, workload.ours, *workload.inputs))
    with torch.inference_mode():
        expected, found = eager(x).float(), ours(x).float()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"{shape}: differs from eager by {error:.1e}"
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = {"eager": lambda: eager(x), "ours": lambda: ours(x)}
    times = interleave(calls, rounds=rounds, bursts=True, clock=clock)
    return times["eager"].minimum / times["ours"].minimum


@click.command()
@options.threads
@click.option("--shapes", "count", type=click.IntRange(1), default=1000, show_default=True, help="At most.")
@click.option("--minutes", type=click.FloatRange(0.0, min_open=True), default=60.0, show_default=True, help="At most.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(count: int, minutes: float, dtype: str, seed: int) -> None:
    """Print how many shapes were measured, how they compare with eager, and the slowest ones."""
    torch.manual_seed(seed)
    found, end, element = {}, time.perf_counter() + 60 * minutes, DTYPES[dtype]
    with steady_allocator(), pinned():
        every = (shape for shape in shapes(seed) if dtype != "bf16" or shape.c >= ONEDNN_HANGS)
        for shape in itertools.islice(every, count):
            if time.perf_counter() > end:
                break
            found[shape] = measure(shape, element, 2)
            if found[shape] < 1.1:  # two rounds are few: measure again where it matters
                found[shape] = measure(shape, element, 10)
        for shape in [shape for shape, ratio in found.items() if ratio < SLOWER]:
            # again, because other processes can slow down a single measurement
            found[shape] = max(found[shape], measure(shape, element, 30))
    worst = sorted(found.items(), key=lambda item: item[1])
    click.echo(
        f"{dtype}, {native.isa()}, {torch.get_num_threads()} threads: {len(found)} shapes, median "
        f"{speedup(statistics.median(found.values()), 'eager')}, "
        f"{sum(ratio < SLOWER for _, ratio in worst)} slower by more than 5 %"
    )
    for shape, ratio in worst[:10]:  # the worst first
        click.echo(f"  {speedup(ratio, 'eager')}  {shape}")


if __name__ == "__main__":
    main()
