"""Where the time of the fused block goes on this CPU, by phase, and what share of its ceiling each phase reaches.

    python benchmarks/cpu_phases.py [--threads 2]

The kernel of the block is timed from inside (`backends.cpu.mlp_native.timed_phases`): seconds of each thread in each
phase, as the mean over the threads. "Outside" is Python, waking the threads, and the end of the call, where one thread
waits for the other. Each figure is the minimum over the calls: other processes only add to them.

The share is relative to the ceiling of the phase, measured in the same process: the rate of PyTorch's fp32 matmul for
the convolution (without the taps outside the image) and the fp32 products, of its bf16 matmul for those in bf16.
LayerNorm, GELU and the residual have almost no products; they lower the shares of their phases.
"""

import time

import click
import torch

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.mlp_native import PHASES, timed_phases
from convnext_kernels.bench import ceilings
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.ceilings import count
from convnext_kernels.bench.tables import Table
from convnext_kernels.bench.timing import pinned, settle, steady_allocator
from convnext_kernels.bench.workloads import EagerBlock
from convnext_kernels.cli import options

CALLS = 100


def measure(block: torch.nn.Module, x: torch.Tensor) -> tuple[float, list[float], float]:
    """Return milliseconds of a call, of each of its phases as the mean over the threads, and of what is outside."""
    calls = []
    for _ in range(5):
        block(x)
    for _ in range(CALLS):
        with timed_phases() as seconds:
            start = time.perf_counter()
            block(x)
            total = time.perf_counter() - start
        phases = seconds.mean(0).tolist()
        calls.append([1e3 * value for value in (total, *phases, total - sum(phases))])
    total, *phases, outside = map(min, zip(*calls, strict=True))
    return total, phases, outside


def row(use_grn: bool, dtype: str, n: int, c: int, size: int, rates: dict[str, float]) -> tuple[str, ...]:
    """Return the cells of one block: its time, the time of each phase, and in brackets the share of its ceiling."""
    settle()
    with torch.inference_mode(False):  # without version counters the packed weights would be checked in full
        block = FusedConvNeXtBlock(c, use_grn=use_grn, layer_scale_init_value=1.0).to(DTYPES[dtype]).eval()
    x = torch.randn(n, c, size, size, dtype=DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    total, phases, outside = measure(block, x)
    work = count(EagerBlock(c, use_grn), [x.float()])
    product = 1e3 * (work.flops - work.vector_flops) / 2 / rates[dtype]
    dwconv = 1e3 * work.vector_flops / rates["fp32"]
    ideal = {"dwconv": dwconv, "W1, GELU": product, "W2, residual": product}
    cells = []
    for name, value in zip((*PHASES, "outside"), (*phases, outside), strict=True):
        share = f" ({ideal[name] / value:.0%})" if name in ideal and value else ""
        cells.append(f"{value:.3f}{share}" if value else "")
    label = f"{'V2' if use_grn else 'V1'} C{c} {size}x{size} b{n} {dtype}"
    return label, f"{total:.2f} ({sum(ideal.values()) / total:.0%})", *cells


@click.command()
@options.threads
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
def main(batches: tuple[int, ...]) -> None:
    """Print a row for each block: milliseconds of every phase, and the share of its ceiling."""
    torch.manual_seed(0)
    with steady_allocator(), torch.inference_mode(), pinned():
        threads = torch.get_num_threads()
        rates = ceilings.measure("cpu")["flops"]
        rates["bf16"] = max(rates["fp32"], rates["bf16"])  # without products of bf16 ours are of fp32
        click.echo(
            f"{native.isa()}, {threads} threads; ceilings {rates['fp32'] / 1e9:.0f} GFLOP/s in fp32, "
            f"{rates['bf16'] / 1e9:.0f} in bf16 products; milliseconds (share of the ceiling)"
        )
        blocks = [
            (g, d, n, *stage) for d in ("fp32", "bf16") for g in (False, True) for n in batches for stage in STAGES
        ]
        table = Table("", ("block", "ms (share)", *PHASES, "outside"), [row(*block, rates) for block in blocks])
    click.echo(table.markdown())


if __name__ == "__main__":
    main()
