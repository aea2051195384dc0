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


def comparison(found: "list[tuple[str, int, list[Row]]]", title: str) -> "Table":
    """A row for each GPU, batch and kind of block; times are of one block. Printed as Markdown, for the docs."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, title_justify="left", caption=NOTE, caption_justify="left", box=box.MARKDOWN)
    for name in ("GPU", "batch", "block", "us", "eager us", "limit us", "vs eager", "vs limit", "plan"):
        shown.add_column(name, justify="right" if name.endswith("us") or name == "batch" else "left", overflow="fold")
    for gpu, batch, rows in found:
        for row in rows:
            if not row.name.startswith("block"):
                continue
            ours, eager, limit = (getattr(row, which).seconds / row.count * 1e6 for which in COLUMNS)
            cells = (f"{ours:.1f}", f"{eager:.1f}", f"{limit:.1f}", speedup(eager / ours), f"{ours / limit:.2f}x")
            shown.add_row(gpu, str(batch), row.name.removeprefix("block "), *cells, "; ".join(row.plan))
    return shown


@click.command("plan")
@options.model
@click.option(
    "--gpu",
    "gpu_names",
    default=("H100",),
    multiple=True,
    metavar="NAME",
    shell_complete=options.complete(lambda: tuning.GPUS),
    help=f"One of {', '.join(tuning.GPUS)}. May be repeated.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    metavar="N",
    default=(8,),
    multiple=True,
    help="Images per forward pass. May be repeated.",
)
@click.option("--size", type=click.IntRange(min=32), metavar="N", default=224, help="Height and width of the images.")
@click.option("--dtype", type=click.Choice(list(options.DTYPES)), default="bf16")
@click.option("--training", is_flag=True, help="Forward and backward pass.")
@options.as_json
def command(
    model_name: str,
    gpu_names: tuple[str, ...],
    batches: tuple[int, ...],
    size: int,
    dtype: str,
    training: bool,
    as_json: bool,
) -> None:
    """Show which kernels every block of a model would run on a GPU, and predict their time.

    With several GPUs or batches: one line for each block, GPU and batch, and no other layers. This needs no GPU.
    """
    try:
        gpus = [tuning.named(name) for name in gpu_names]
    except ValueError as error:
        raise click.ClickException(f"--gpu: {error}") from error
    import torch

    from convnext_kernels.tuning import explain

    element = getattr(torch, options.DTYPES[dtype])
    model, full_name = _meta_model(model_name)
    recordings = [explain.record(model, (batch, 3, size, size)) for batch in batches]
    found = [
        (gpu, batch, explain.explain(recording, element, training, gpu))
        for gpu in gpus
        for batch, recording in zip(batches, recordings, strict=True)
    ]
    if as_json:
        documents = [
            {"model": full_name, "gpu": asdict(gpu), "batch": batch, "size": size, "dtype": dtype, "training": training}
            | {"basis": "predicted", "rows": [asdict(row) for row in rows]}
            for gpu, batch, rows in found
        ]
        options.print_json(documents if len(documents) > 1 else documents[0])
        return
    direction = "forward and backward" if training else "forward"
    what = f"{size} x {size}, {dtype}, {direction}: predicted"
    if len(found) > 1:
        shown = comparison([(gpu.name, batch, rows) for gpu, batch, rows in found], f"{full_name}, {what}")
        options.console(400).print(shown)
        return
    gpu, batch, rows = found[0]
    options.console(160).print(table(rows, f"{full_name} on {gpu.name}, batch {batch}, {what}"))
