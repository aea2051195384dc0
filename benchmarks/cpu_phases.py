"""Where the time of the fused block goes on this CPU, by phase, and what share of its ceiling each phase reaches.

    python benchmarks/cpu_phases.py [--threads 2] [--isa avx512] [--markdown]

The kernel of the block is timed from inside (`backends.cpu.mlp_native.timed_phases`): seconds of each thread in each
phase, of the call with the median time, as the mean over the threads. "Outside" is Python, waking the threads, and the
end of the call, where one thread waits for the other.

The share is relative to the ceiling of the phase, measured in the same process: multiply-adds from registers for the
convolution (without the taps outside the image) and the fp32 products, the rate of the bf16 products if the machine
has them. LayerNorm, GELU and the residual have almost no products; they lower the shares of their phases.
"""

import statistics
import time

import click
import torch

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.mlp_native import PHASES, timed_phases
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.timing import pinned, settle, steady_allocator

CALLS = 30
OUTSIDE = "outside"


def measure(block: torch.nn.Module, x: torch.Tensor) -> tuple[float, list[float]]:
    """Return (milliseconds of the median call, milliseconds of each of its phases, as the mean over the threads)."""
    calls = []
    for _ in range(5):
        block(x)
    for _ in range(CALLS):
        with timed_phases() as seconds:
            start = time.perf_counter()
            block(x)
            total = time.perf_counter() - start
        calls.append((total * 1e3, [1e3 * value for value in seconds.mean(0).tolist()]))
    middle = statistics.median_low(total for total, _ in calls)
    return next(call for call in calls if call[0] == middle)


def ceilings(threads: int) -> tuple[float, float]:
    """Return operations per second of fp32 multiply-adds and of the fastest bf16 products that the kernels can use."""
    extension = native.extension()
    # The speed of a shared machine changes: the best rate within a second is used, so shares stay below 100 %.
    rates = {kind: extension.arithmetic_rate(kind, threads, 1.0) for kind in extension.arithmetic_kinds()}
    kind = {"avx512bf16": "dot_bf16", "amx": "tile_bf16"}.get(native.isa(), "fma_fp32")
    return rates["fma_fp32"], rates[kind]


def row(use_grn: bool, dtype: torch.dtype, n: int, c: int, size: int, fp32: float, bf16: float) -> tuple[str, ...]:
    """Return the cells of one block: its time, the time of each phase, and in brackets the share of its ceiling."""
    settle()
    with torch.inference_mode(False):  # without version counters the packed weights would be checked in full
        block = FusedConvNeXtBlock(c, use_grn=use_grn, layer_scale_init_value=1.0).to(dtype).eval()
    x = torch.randn(n, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    total, phases = measure(block, x)
    pixels = n * size * size
    product = 2e3 * pixels * 4 * c * c / (fp32 if dtype == torch.float32 else bf16)
    taps = sum(min(size, i + 4) - max(0, i - 3) for i in range(size)) ** 2  # inside the image
    ideal = {"dwconv": 2e3 * n * taps * c / fp32, "W1, GELU": product, "W2, residual": product}
    cells = []
    for name, value in zip((*PHASES, OUTSIDE), (*phases, total - sum(phases)), strict=True):
        share = f" ({ideal[name] / value:.0%})" if name in ideal and value else ""
        cells.append(f"{value:.3f}{share}" if value else "")
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    label = f"{'V2' if use_grn else 'V1'} C{c} {size}x{size} b{n} {kind}"
    return label, f"{total:.2f} ({sum(ideal.values()) / total:.0%})", *cells


@click.command()
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--isa", help="Instruction set of the kernels. [default: the machine's best]")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--markdown", is_flag=True, help="Print a table for docs/cpu_kernels.md.")
def main(threads: int, isa: str | None, batches: tuple[int, ...], markdown: bool) -> None:
    """Print a row for each block: milliseconds of every phase, and the share of its ceiling."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    header = ("block", "ms (share)", *PHASES, OUTSIDE)
    with native.use_isa(isa or native.isa()), steady_allocator(), torch.inference_mode(), pinned():
        fp32, bf16 = ceilings(threads)
        click.echo(
            f"{native.isa()}, {threads} threads; ceilings {fp32 / 1e9:.0f} GFLOP/s in fp32, {bf16 / 1e9:.0f} in bf16 "
            "products; milliseconds (share of the ceiling)"
        )
        found = [
            row(use_grn, dtype, n, c, size, fp32, bf16)
            for dtype in (torch.float32, torch.bfloat16)
            for use_grn in (False, True)
            for n in batches
            for c, size in STAGES
        ]
    if markdown:
        click.echo("\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *found)))
        return
    widths = [max(map(len, column)) for column in zip(header, *found, strict=True)]
    for line in (header, *found):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
