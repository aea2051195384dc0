"""``convnext-kernels plan``: which kernels a model would run on a GPU, and their predicted time."""

import click
import torch

from convnext_kernels import tuning
from convnext_kernels.bench import workloads
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.bench.tables import Table, speedup
from convnext_kernels.cli import load, options
from convnext_kernels.tuning import explain
from convnext_kernels.tuning.explain import Cost, Row

NOTE = (
    "Predicted, not measured: a cost model of data sheets and of counted bytes, instructions and launches. "
    "eager: a lower bound of PyTorch's time, op by op. "
    "limit: two kernels per block at the GPU's peak rates, without launch time."
)
GPUS = f"One of {', '.join(tuning.GPUS)}. May be repeated."
COLUMNS = ("launches", "MiB", "us", "eager launches", "eager MiB", "eager us", "limit MiB", "limit us")


def table(rows: list[Row], title: str) -> Table:
    """A row for each kind of call, and the totals."""

    def cells(ours: Cost, eager: Cost, limit: Cost) -> list[str]:
        found = []
        for cost in (ours, eager, limit):
            found += [str(cost.launches or "-"), f"{cost.bytes / 2**20:.1f}", f"{cost.seconds * 1e6:.0f}"]
        return [*found[:6], *found[7:], speedup(eager.seconds / ours.seconds)]

    lines = [(row.name, str(row.count), *cells(row.ours, row.eager, row.limit), "\n".join(row.plan)) for row in rows]
    totals = (sum((getattr(row, which) for row in rows), Cost()) for which in ("ours", "eager", "limit"))
    lines.append(("total", str(sum(row.count for row in rows)), *cells(*totals), ""))
    return Table(title, ("layer", "count", *COLUMNS, "vs eager", "plan"), lines, NOTE)


def comparison(found: list[tuple[tuning.Gpu, int, list[Row]]], title: str) -> Table:
    """A row for each GPU, batch and kind of block; times are of one block. Printed in Markdown, for the docs."""
    lines = []
    for gpu, batch, rows in found:
        for row in rows:
            if row.name.startswith("block"):
                ours, eager, limit = (1e6 * cost.seconds / row.count for cost in (row.ours, row.eager, row.limit))
                times = f"{ours:.1f}", f"{eager:.1f}", f"{limit:.1f}", speedup(eager / ours), f"{ours / limit:.2f}x"
                lines.append((gpu.name, str(batch), row.name.removeprefix("block "), *times, "; ".join(row.plan)))
    columns = ("GPU", "batch", "block", "us", "eager us", "limit us", "vs eager", "vs limit", "plan")
    return Table(title, columns, lines, NOTE)


def _gpu(_context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]) -> list[tuning.Gpu]:
    try:
        return [tuning.named(name) for name in names]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("plan")
@options.model
@click.option("--gpu", "gpus", default=("H100",), multiple=True, metavar="NAME", callback=_gpu, help=GPUS)
@options.count("--batch", (8,), "Images per forward pass. May be repeated.", multiple=True)
@options.size
@options.dtype
@options.training
def command(
    model_name: str,
    gpus: list[tuning.Gpu],
    batch: tuple[int, ...],
    size: int,
    dtype: str,
    training: bool,
) -> None:
    """Show which kernels every block of a model would run on a GPU, and predict their time.

    With several GPUs or batches: one line for each block, GPU and batch, and no other layers. This needs no GPU.
    """
    library, plain = load.resolve(model_name)
    full_name = f"{library}/{plain}"
    with torch.device("meta"):
        model = workloads.load(library, plain).to(memory_format=torch.channels_last)
    load.accelerated(model, full_name)
    recordings = [explain.record(model, (n, 3, size, size)) for n in batch]
    found = [
        (gpu, n, explain.explain(recording, DTYPES[dtype], training, gpu))
        for gpu in gpus
        for n, recording in zip(batch, recordings, strict=True)
    ]
    if len(found) > 1:
        title = f"{full_name}, {size} x {size}, {dtype}, {'forward and backward' if training else 'forward'}: predicted"
        shown = comparison(found, title)
        click.echo(f"{shown.markdown()}\n\n{shown.note}")
        return
    gpu, n, rows = found[0]
    title = f"{full_name} on {gpu.name}, {options.described(n, size, dtype, training)}: predicted"
    options.show(table(rows, title), width=160)
