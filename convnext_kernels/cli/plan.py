"""``convnext-kernels plan``: what the kernels would do with a model on a GPU, and what that is predicted to take."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels import tuning
from convnext_kernels.cli import load, options

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from convnext_kernels.planner.explain import Cost, Row

NOTE = (
    "Predicted, not measured: a cost model of data sheets and counted bytes, instructions and launches. "
    "eager: a lower bound of PyTorch op by op. "
    "floor: two kernels a block at the GPU's peak rates, launches not counted."
)


def _meta_model(name: str) -> tuple["nn.Module", str]:
    """An accelerated model without memory, and its name with its library."""
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
    model = convnext_kernels.accelerate(model.eval().to(memory_format=torch.channels_last))
    if not convnext_kernels.acceleration_report(model).replaced:
        raise click.ClickException(f"--model {library}/{plain}: this package replaces nothing in it")
    return model, f"{library}/{plain}"


def _columns(cost: "Cost") -> tuple[str, str, str]:
    return str(cost.launches or "-"), f"{cost.bytes / 2**20:.1f}", f"{cost.seconds * 1e6:.0f}"


def table(rows: "list[Row]", title: str) -> "Table":
    """A line for each kind of call, and the totals."""
    from rich.table import Table

    from convnext_kernels.planner.explain import Cost

    shown = Table(title=title, caption=NOTE, caption_justify="left", show_footer=True)
    ours, eager, floor = (sum((getattr(row, which) for row in rows), Cost()) for which in ("ours", "eager", "floor"))
    shown.add_column("layer", "total", overflow="fold")
    shown.add_column("x", str(sum(row.count for row in rows)), justify="right")
    shown.add_column("plan", overflow="fold")
    for which, cost in (("", ours), ("eager ", eager), ("floor ", floor)):
        for name, total in zip(("launches", "MiB", "us"), _columns(cost), strict=True):
            if (which, name) != ("floor ", "launches"):
                shown.add_column(f"{which}{name}", total, justify="right")
    shown.add_column("eager / ours", f"{eager.seconds / ours.seconds:.2f}", justify="right")
    for row in rows:
        cells = (*_columns(row.ours), *_columns(row.eager), *_columns(row.floor)[1:])
        ratio = f"{row.eager.seconds / row.ours.seconds:.2f}"
        shown.add_row(row.name, str(row.count), "\n".join(row.plan), *cells, ratio)
    return shown


@click.command("plan")
@click.option("--model", "name", default="convnext_tiny", show_default=True, help="As torchvision or timm name it.")
@click.option("--gpu", "gpu_name", default="H100", show_default=True, help=f"One of {', '.join(tuning.GPUS)}.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Side of the images.")
@click.option("--dtype", type=click.Choice(list(options.DTYPES)), default="bf16", show_default=True)
@click.option("--training", is_flag=True, help="Forward and backward.")
@click.option("--json", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures there too.")
def command(name: str, gpu_name: str, batch: int, size: int, dtype: str, training: bool, file: Path | None) -> None:
    """Show which kernels would run for every block of a model, and predict their time. Needs no GPU."""
    try:
        gpu = tuning.named(gpu_name)
    except ValueError as error:
        raise click.ClickException(f"--gpu: {error}") from error
    if file is not None:
        options.check_writable(file, "--json")
    import torch
    from rich.console import Console

    from convnext_kernels.planner import explain

    element = getattr(torch, options.DTYPES[dtype])
    model, full_name = _meta_model(name)
    recording = explain.record(model, (batch, 3, size, size))
    rows = explain.explain(recording, element, training, gpu)
    direction = "forward and backward" if training else "forward"
    title = f"{full_name} on {gpu.name}, batch {batch}, {size} x {size}, {dtype}, {direction}: predicted"
    if file is not None:
        head = {"model": full_name, "gpu": asdict(gpu), "batch": batch, "size": size, "dtype": dtype}
        content = head | {"training": training, "basis": "predicted", "rows": [asdict(row) for row in rows]}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # of a file or a pipe nobody knows the width
    console.print(table(rows, title), highlight=False)
