"""Where the time of the fused block goes on this CPU, phase by phase, and what share of its ceilings each reaches.

    python benchmarks/cpu_phases.py [--threads 2] [--isa avx512] [--markdown]

The block's own kernel is timed from inside (`backends.cpu.bottleneck.timed_phases`): seconds of each thread in each
phase, of the call that took the median time. The share is of the ceiling that binds the phase, measured in the same
process: multiply-adds from registers for the convolution and the fp32 products, the bf16 products' own rate where there
is one. LayerNorm, GELU and the residual have no products to speak of; they lower the shares of the phases they are
part of.
"""

import statistics
import time

import click
import torch

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.bottleneck import PHASES, timed_phases
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.timing import pinned, settle, steady_allocator

CALLS = 30


def measure(block: torch.nn.Module, x: torch.Tensor) -> tuple[float, list[float]]:
    """(milliseconds of the median call, milliseconds of each phase in it, mean of the threads)."""
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


def rows(threads: int, dtypes: tuple[torch.dtype, ...], batches: tuple[int, ...]) -> list[tuple[str, ...]]:
    """One row for each block: its time, each phase's time, and in brackets the share of its ceiling."""
    extension = native.extension()
    kinds = extension.arithmetic_kinds()
    found = []
    for dtype in dtypes:
        for use_grn in (False, True):
            for n in batches:
                for c, size in STAGES:
                    settle()
                    peak = {kind: extension.arithmetic_rate(kind, threads, 0.02) for kind in kinds}
                    # The best the machine has, as `bench` states it; forced instruction sets keep fp32's.
                    bf16 = max((rate for kind, rate in peak.items() if "bf16" in kind), default=peak["fma_fp32"])
                    products = bf16 if dtype == torch.bfloat16 and native.isa() in ("avx512bf16", "amx") else None
                    products = products or peak["fma_fp32"]
                    with torch.inference_mode(False):  # packed weights are checked in full without a version counter
                        block = FusedConvNeXtBlock(c, use_grn=use_grn, layer_scale_init_value=1.0).to(dtype).eval()
                    x = torch.randn(n, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
                    total, phases = measure(block, x)
                    pixels = n * size * size
                    ideal = {
                        "dwconv": 2e3 * pixels * c * 49 / peak["fma_fp32"],
                        "W1, GELU": 2e3 * pixels * 4 * c * c / products,
                        "W2, residual": 2e3 * pixels * 4 * c * c / products,
                    }
                    cells = []
                    for name, value in zip(PHASES, phases, strict=True):
                        share = f" ({ideal[name] / value:.0%})" if name in ideal and value else ""
                        cells.append(f"{value:.3f}{share}" if value else "")
                    whole = f"{total:.2f} ({sum(ideal.values()) / total:.0%})"
                    label = f"{'V2' if use_grn else 'V1'} C{c} {size}x{size} b{n} {'bf16' if dtype.itemsize == 2 else 'fp32'}"
                    found.append((label, whole, *cells))
    return found


@click.command()
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--isa", help="Instruction set of the kernels. [default: the machine's best]")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--markdown", is_flag=True, help="Print a table for docs/cpu_kernels.md.")
def main(threads: int, isa: str | None, batches: tuple[int, ...], markdown: bool) -> None:
    """Print a row for each block: milliseconds of every phase and the share of its ceiling."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    header = ("block", "ms (share)", *PHASES)
    with native.use_isa(isa or native.isa()), steady_allocator(), torch.inference_mode(), pinned():
        click.echo(f"{native.isa()}, {threads} threads; milliseconds (share of the ceiling)")
        found = rows(threads, (torch.float32, torch.bfloat16), batches)
    if markdown:
        click.echo("\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *found)))
        return
    widths = [max(map(len, column)) for column in zip(header, *found, strict=True)]
    for line in (header, *found):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
