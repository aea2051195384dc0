"""``convnext-kernels plan``: which kernels a model would run on a GPU, and their predicted time."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from convnext_kernels import tuning
from convnext_kernels.bench.charts import speedup
from convnext_kernels.cli import load, options

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from convnext_kernels.tuning.explain import Cost, Row

NOTE = (
    "Predicted, not measured: a cost model of data sheets and of counted bytes, instructions and launches. "
    "eager: a lower bound of PyTorch's time, op by op. "
    "limit: two kernels per block at the GPU's peak rates, without launch time."
)
COLUMNS = {"ours": "", "eager": "eager ", "limit": "limit "}  # field of explain.Row: prefix of its columns


def _meta_model(name: str) -> tuple["nn.Module", str]:
    """Build the accelerated model on the meta device; returns it and its name with the library."""
    import torch

    import convnext_kernels

    library, plain = load.resolve(name)
    try:
        with torch.device("meta"):
            if library == "torchvision":
                import torchvision

                model = torchvision.models.get_model(plain, weights=None)
            else:
                import timm

                model = timm.create_model(plain, pretrained=False)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise click.ClickException(f"--model {library}/{plain}: cannot be built: {reason:.300}") from error
    unchanged = click.ClickException(f"--model {library}/{plain}: it has no module that this package can replace")
    if not convnext_kernels.acceleration_report(model).rows:
        raise unchanged
    model = convnext_kernels.accelerate(model.eval().to(memory_format=torch.channels_last))
    if not convnext_kernels.acceleration_report(model).replaced:
        raise unchanged
    return model, f"{library}/{plain}"


def _columns(cost: "Cost") -> tuple[str, str, str]:
    return str(cost.launches or "-"), f"{cost.bytes / 2**20:.1f}", f"{cost.seconds * 1e6:.0f}"


def table(rows: "list[Row]", title: str) -> "Table":
    """A row for each kind of call, and the totals."""
    from rich.table import Table

    from convnext_kernels.tuning.explain import Cost

    shown = Table(title=title, caption=NOTE, caption_justify="left", show_footer=True)
    totals = {which: sum((getattr(row, which) for row in rows), Cost()) for which in COLUMNS}
    shown.add_column("layer", "total", overflow="fold")
    shown.add_column("count", str(sum(row.count for row in rows)), justify="right")
    shown.add_column("plan", overflow="fold")
    for which, prefix in COLUMNS.items():
        for name, total in zip(("launches", "MiB", "us"), _columns(totals[which]), strict=True):
            if (which, name) != ("limit", "launches"):
                shown.add_column(f"{prefix}{name}", total, justify="right")
    total = speedup(totals["eager"].seconds / totals["ours"].seconds)
    shown.add_column("vs eager", total, justify="right", no_wrap=True)
    for row in rows:
        cells = (*_columns(row.ours), *_columns(row.eager), *_columns(row.limit)[1:])
        faster = speedup(row.eager.seconds / row.ours.seconds)
        shown.add_row(row.name, str(row.count), "\n".join(row.plan), *cells, faster)
    return shown


@click.command("plan")
@options.model
@click.option(
    "--gpu",
    "gpu_name",
    default="H100",
    metavar="NAME",
    shell_complete=options.complete(lambda: tuning.GPUS),
    help=f"One of {', '.join(tuning.GPUS)}.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", default=8, help="Images per forward pass.")
@click.option("--size", type=click.IntRange(min=32), metavar="N", default=224, help="Height and width of the images.")
@click.option("--dtype", type=click.Choice(list(options.DTYPES)), default="bf16")
@click.option("--training", is_flag=True, help="Forward and backward pass.")
@options.as_json
def command(model_name: str, gpu_name: str, batch: int, size: int, dtype: str, training: bool, as_json: bool) -> None:
    """Show which kernels every block of a model would run on a GPU, and predict their time.

    This needs no GPU.
    """
    try:
        gpu = tuning.named(gpu_name)
    except ValueError as error:
        raise click.ClickException(f"--gpu: {error}") from error
    import torch

    from convnext_kernels.tuning import explain

    element = getattr(torch, options.DTYPES[dtype])
    model, full_name = _meta_model(model_name)
    recording = explain.record(model, (batch, 3, size, size))
    rows = explain.explain(recording, element, training, gpu)
    if as_json:
        head = {"model": full_name, "gpu": asdict(gpu), "batch": batch, "size": size, "dtype": dtype}
        values = [asdict(row) for row in rows]
        options.print_json(head | {"training": training, "basis": "predicted", "rows": values})
        return
    direction = "forward and backward" if training else "forward"
    title = f"{full_name} on {gpu.name}, batch {batch}, {size} x {size}, {dtype}, {direction}: predicted"
    options.console(160).print(table(rows, title))
