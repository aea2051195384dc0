"""``convnext-kernels roadmap``: every step from ResNet to ConvNeXt, as published, counted and measured."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.charts import speedup
from convnext_kernels.cli import options
from convnext_kernels.cli.roadmap_report import TITLES, Row, Speed, content, write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from convnext_kernels.models.published import Regime

SHARE = 0.015  # allowed difference from the published GFLOPs
# Figures that the paper's description cannot give, by (step, regime).
NOTES = {
    ("layer_norm", "resnet50"): "published 4.46, but a LayerNorm counts what a BatchNorm does: the described network "
    "has the multiply-adds of the row above it, as in the ResNet-200 column (14.81 twice)",
}
# Other networks for comparison, by regime: (library/name, row of the paper's table or "").
OTHERS = {
    "resnet50": (
        ("torchvision/swin_t", "Swin (for comparison)"),
        ("timm/vit_small_patch16_224", ""),
        ("torchvision/resnext50_32x4d", ""),
        ("torchvision/mobilenet_v2", ""),
    ),
    "resnet200": (
        ("torchvision/swin_b", "Swin (for comparison)"),
        ("timm/vit_base_patch16_224", ""),
    ),
}


def _other(name: str) -> "nn.Module":
    library, _, plain = name.partition("/")
    if library == "torchvision":
        return options.need("torchvision.models", "roadmap").get_model(plain, weights=None)
    return options.need("timm", "roadmap").create_model(plain, pretrained=False)


def _names() -> list[str]:
    from convnext_kernels.models import roadmap

    return [*roadmap.list_steps(), *dict.fromkeys(name for others in OTHERS.values() for name, _ in others)]


def networks(regime: str, names: tuple[str, ...] = ()) -> "list[tuple[Row, Callable[[], nn.Module]]]":
    """Count the networks of `regime`, or those called `names`; returns (row, function that builds the network).

    For an unknown name ClickException suggests names.
    """
    import torch

    from convnext_kernels import acceleration_report
    from convnext_kernels.models import published, roadmap
    from convnext_kernels.models.convnext import near
    from convnext_kernels.models.counting import count

    for name in names:
        if name not in _names():
            raise click.ClickException(f"--step: unknown step {name!r}; {near(name, _names())}")
    figures = {row.title: row.regimes[regime] for row in published.roadmap()}

    def row(name: str, title: str, paper: "Regime | None", build: "Callable[[], nn.Module]", **more: object) -> Row:
        with torch.device("meta"):
            model = build()
        counted = count(model)
        fused = sum(r.fused for r in acceleration_report(model).rows)
        top1, gflops = (paper.top1.text, paper.gflops) if paper else (None, None)
        ours, note = counted.multiply_adds / 1e9, ""
        if gflops and abs(gflops.deviation(ours)) > SHARE:
            note = NOTES.get((name, regime), "differs from the published GFLOPs")
        return Row(*(name, title, top1, gflops and gflops.text, ours, counted.parameters / 1e6, fused, note), **more)

    found = []
    for step in roadmap.STEPS:
        if names and step.name not in names:
            continue

        def build(step: str = step.name) -> "nn.Module":
            return roadmap.create_step(step, regime)

        found.append((row(step.name, step.title, figures[step.title], build, adopted=step.adopted), build))
    for name, title in OTHERS[regime]:
        if names and name not in names:
            continue

        def build(name: str = name) -> "nn.Module":
            return _other(name)

        found.append((row(name, name, figures.get(title), build, step=False), build))
    return found


def _measure(build: "Callable[[], nn.Module]", fused: int, batch: int, size: int, rounds: int) -> Speed:
    import torch

    from convnext_kernels import use_backend
    from convnext_kernels.bench.timing import interleave, steady_allocator

    torch.manual_seed(0)
    model = build().eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def eager() -> object:
        with use_backend("eager"):
            return model(x)

    candidates = {"eager": eager} | ({"accelerated": lambda: model(x)} if fused else {})
    with steady_allocator():
        times = {name: (t.minimum, t.median) for name, t in interleave(candidates, rounds=rounds).items()}
    return Speed(times["eager"], times.get("accelerated"))


def _table(rows: list[Row], regime: str, batch: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    measured = any(row.speed for row in rows)
    table = Table(title=f"{TITLES[regime]}: top-1 and GFLOPs (multiply-adds) as published; GFLOPs and params counted")
    table.add_column("step", overflow="fold")
    for name in ("top-1 %", "GFLOPs", "counted", "differs", "M params", "fused modules"):
        table.add_column(name, justify="right")
    if measured:
        for name in ("images/s eager", "images/s accelerated", "vs eager"):
            table.add_column(name, justify="right")
    for row in rows:
        differs = "-" if row.published is None else f"{row.gflops / float(row.published) - 1:+.2%}"
        cells: list[str | Text] = [
            *(Text(row.title + " *" * bool(row.note)), row.top1 or "-", row.published or "-", f"{row.gflops:.3f}"),
            *(Text(differs, "red" if row.note else ""), f"{row.parameters:.1f}", str(row.fused or "-")),
        ]
        if measured:
            cells += _speed_cells(row.speed, batch)
        table.add_row(*cells, style="dim" if not row.adopted else "", end_section=row.name == "convnext")
    return table


def _speed_cells(speed: Speed | None, batch: int) -> list[str]:
    if speed is None:
        return ["-"] * 3
    cells = [f"{1e3 * batch / speed.eager[1]:.1f}"]
    if speed.accelerated is None:
        return [*cells, "-", "-"]
    return [*cells, f"{1e3 * batch / speed.accelerated[1]:.1f}", speedup(speed.eager[1] / speed.accelerated[1])]


def _print(console: "Console", rows: list[Row], regime: str, batch: int) -> None:
    console.print(_table(rows, regime, batch))
    for row in rows:
        if row.note:
            console.print(f"* {row.title}: {row.note}")


@click.command("roadmap")
@click.option(
    "--regime",
    "regimes",
    type=click.Choice(list(TITLES)),
    metavar="NAME",
    multiple=True,
    default=tuple(TITLES),
    help="Column of the paper, can be repeated.",
)
@click.option(
    "--step",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=options.complete(_names),
    help="Only this step or network, can be repeated.",
)
@click.option("--measure", is_flag=True, help="Time every network in fp32, eager and accelerated.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", default=1, help="Images per batch, for --measure.")
@click.option("--size", type=click.IntRange(min=32), metavar="N", default=224, help="Height and width, for --measure.")
@click.option("--rounds", type=click.IntRange(min=1), metavar="N", default=5, help="Timed rounds, for --measure.")
@options.threads
@click.option(
    "--report", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Write charts, HTML and JSON here."
)
@options.as_json
def command(
    regimes: tuple[str, ...],
    names: tuple[str, ...],
    measure: bool,
    batch: int,
    size: int,
    rounds: int,
    threads: int | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Show every step from ResNet to ConvNeXt.

    Accuracy and GFLOPs as published, GFLOPs and parameters as counted here, and with --measure the speed here.
    """
    if folder is not None:
        options.check_writable(folder / "roadmap.html", "--report")
    from convnext_kernels import environment

    console = options.console(150)
    settings = {"batch": batch, "size": size, "rounds": rounds} if measure else None
    results: dict[str, list[Row]] = {}
    for regime in dict.fromkeys(regimes):
        found = networks(regime, names)
        if measure:
            with options.thread_count(threads), options.progress_bar(f"{regime}", len(found)) as advance:
                for i, (row, build) in enumerate(found):
                    advance(f"{regime} {row.name}", 0)
                    speed = _measure(build, row.fused, batch, size, rounds)
                    found[i] = (dataclasses.replace(row, speed=speed), build)
                    advance(f"{regime} {row.name}", 1)
        results[regime] = [row for row, _ in found]
        if not as_json:
            _print(console, results[regime], regime, batch)
    machine = environment.collect()
    if as_json:
        options.print_json(content(results, settings, machine))
    elif measure:
        console.print(
            f"images/s: medians of {rounds} rounds, batch {batch}, {size} x {size}, fp32, channels_last, random "
            "weights. accelerated: the same network with the kernels of this package; '-': they compute nothing in it."
        )
    if folder is not None:
        for file in write(results, settings, machine, folder):
            click.echo(f"Written: {file}", err=as_json)
