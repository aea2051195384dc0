"""``convnext-kernels roadmap``: every step from ResNet to ConvNeXt, as published, counted and measured."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from torch import nn

from convnext_kernels import acceleration_report, environment, use_backend
from convnext_kernels.bench import workloads
from convnext_kernels.bench.tables import Table, date, machine, speedup, write_page
from convnext_kernels.bench.timing import interleave, steady_allocator
from convnext_kernels.cli import options
from convnext_kernels.models import published, roadmap
from convnext_kernels.models.counting import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure
TITLES = {"resnet50": "ResNet-50 to ConvNeXt-T", "resnet200": "ResNet-200 to ConvNeXt-B"}  # by regime
NAME = "roadmap.html"
SHARE = 0.015  # allowed difference from the published GFLOPs
# Figures that the paper's description cannot give, by (step, regime).
NOTES = {
    ("layer_norm", "resnet50"): "published 4.46, but a LayerNorm counts what a BatchNorm does: the described network "
    "has the multiply-adds of the row above it, as in the ResNet-200 column (14.81 twice)",
}
SWIN = "Swin (for comparison)"  # a row of the paper's table
OTHERS = {  # networks for comparison, by regime: {library/name: row of the paper's table or ""}
    "resnet50": {
        "torchvision/swin_t": SWIN,
        "timm/vit_small_patch16_224": "",
        "torchvision/resnext50_32x4d": "",
        "torchvision/mobilenet_v2": "",
    },
    "resnet200": {"torchvision/swin_b": SWIN, "timm/vit_base_patch16_224": ""},
}


@dataclass(frozen=True)
class Row:
    """A network."""

    name: str
    title: str
    top1: str | None  # as published
    published: str | None  # GFLOPs
    gflops: float  # counted
    parameters: float  # millions
    fused: int  # modules that the kernels of this package compute
    note: str
    # Milliseconds, median, of "eager" and, if the package replaces something, "accelerated".
    speed: dict[str, float] | None = None


def _build(name: str, regime: str) -> nn.Module:
    library, slash, plain = name.partition("/")
    return workloads.load(library, plain) if slash else roadmap.create_step(name, regime)


def networks(regime: str, names: tuple[str, ...] = ()) -> list[Row]:
    """Count the networks of `regime`, or those called `names`; ClickException for an unknown name suggests others."""
    every = [*roadmap.list_steps(), *(name for others in OTHERS.values() for name in others)]
    options.check_names("--step: unknown step", names, every)
    figures = {row.title: row.regimes[regime] for row in published.roadmap()}
    known = {step.name: (step.title, step.title) for step in roadmap.STEPS}
    known |= {name: (name, title) for name, title in OTHERS[regime].items()}
    found = []
    for name, (title, printed) in known.items():
        if names and name not in names:
            continue
        with torch.device("meta"):
            model = _build(name, regime)
        counted, paper, note = count(model), figures.get(printed), ""
        gflops, texts = counted.multiply_adds / 1e9, (None, None)
        if paper:
            texts = paper.top1.text, paper.gflops.text
            if abs(paper.gflops.deviation(gflops)) > SHARE:
                note = NOTES.get((name, regime), "differs from the published GFLOPs")
        fused = sum(row.fused for row in acceleration_report(model).rows)
        found.append(Row(name, title, *texts, gflops, counted.parameters / 1e6, fused, note))
    return found


def _measured(row: Row, regime: str, size: int, rounds: int) -> Row:
    torch.manual_seed(0)
    model = _build(row.name, regime).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)

    def eager() -> object:
        with use_backend("eager"):
            return model(x)

    candidates = {"eager": eager} | ({"accelerated": lambda: model(x)} if row.fused else {})
    with steady_allocator():
        times = interleave(candidates, rounds=rounds)
    return replace(row, speed={name: t.median for name, t in times.items()})


def table(rows: list[Row], regime: str, settings: dict[str, int] | None) -> Table:
    """A row for each network; below it what is odd, and how it was measured."""
    columns = ("step", "top-1 %", "GFLOPs", "counted", "differs", "M params", "fused modules")
    columns += ("images/s eager", "images/s accelerated", "vs eager") if settings else ()
    cells, notes = [], [f"* {row.title}: {row.note}" for row in rows if row.note]
    for row in rows:
        differs = "-" if row.published is None else f"{row.gflops / float(row.published) - 1:+.2%}"
        figures = (row.top1 or "-", row.published or "-", f"{row.gflops:.3f}", differs, f"{row.parameters:.1f}")
        speeds: tuple[str, ...] = ()
        if settings:
            eager, ours = map(row.speed.get, ("eager", "accelerated"))
            speeds = tuple("-" if t is None else f"{1e3 / t:.1f}" for t in (eager, ours))
            speeds += ("-" if ours is None else speedup(eager / ours),)
        cells.append((row.title + " *" * bool(row.note), *figures, str(row.fused or "-"), *speeds))
    if settings:
        notes.append(
            "images/s: medians of {rounds} rounds, batch 1, {size} x {size}, fp32, channels_last, random "
            "weights. accelerated: the same network with the kernels of this package; '-': they compute nothing in "
            "it.".format(**settings)
        )
    title = f"{TITLES[regime]}: top-1 and GFLOPs (multiply-adds) as published; GFLOPs and params counted"
    return Table(title, columns, cells, "\n".join(notes))


def chart(rows: list[Row]) -> "Figure":
    """Bars: published accuracy, beside the counted GFLOPs."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.top1]
    accuracy = [float(row.top1) for row in shown]
    figure = Figure(figsize=(6.4, 1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([f"{row.title}, {row.gflops:.2f} GFLOPs" for row in shown], accuracy, color="#e4572e")
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.set_xlim(min(accuracy) - 1.5, max(accuracy) + 1)
    axes.invert_yaxis()
    axes.set_title("ImageNet-1k top-1, %, as published")
    return figure


def write(results: dict[str, list[Row]], settings: dict[str, int] | None, folder: Path) -> None:
    """Write roadmap.html and a PNG for each regime to `folder`; OSError if that fails."""
    sections = {}
    for regime, rows in results.items():
        figure = chart(rows)
        figure.savefig(folder / f"roadmap-{regime}.png", dpi=150, facecolor="white")
        sections[TITLES[regime]] = [[("", figure)], table(rows, regime, settings)]
    sections["Machine"] = machine(environment.collect())
    about = f"Accuracy and GFLOPs as published in arXiv 2201.03545 (tables 10 and 11), and as counted here. {date()}"
    write_page(folder / NAME, "From ResNet to ConvNeXt", about, sections)


@click.command("roadmap")
@click.option("--regime", type=click.Choice(list(TITLES)), multiple=True, default=tuple(TITLES), help="Of the paper.")
@click.option("--step", multiple=True, metavar="NAME", help="Only this step or network, can be repeated.")
@click.option("--measure", is_flag=True, help="Time every network in fp32, eager and accelerated.")
@options.count("--size", 224, "Height and width, for --measure.", least=32)
@options.count("--rounds", 5, "Timed rounds, for --measure.")
@options.threads
@options.report(None, "Write charts and HTML here.", NAME)
def command(
    regime: tuple[str, ...],
    step: tuple[str, ...],
    measure: bool,
    size: int,
    rounds: int,
    folder: Path | None,
) -> None:
    """Show every step from ResNet to ConvNeXt.

    Accuracy and GFLOPs as published, GFLOPs and parameters as counted here, and with --measure the speed here.
    """
    settings = {"size": size, "rounds": rounds} if measure else None
    results = {name: networks(name, step) for name in dict.fromkeys(regime)}
    for name, rows in results.items():
        if settings:
            with options.progress_bar(name, len(rows)) as advance:
                for i, row in enumerate(rows):
                    rows[i] = _measured(row, name, **settings)
                    advance(f"{name} {row.name}", 1)
        options.show(table(rows, name, settings), width=150)
    if folder is not None:
        write(results, settings, folder)
        click.echo(f"Written: {folder / NAME}, and a PNG of each chart beside it")
