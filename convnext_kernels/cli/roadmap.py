"""``convnext-kernels roadmap``: every step from ResNet to ConvNeXt, as published, counted and measured."""

from collections.abc import Callable
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


def _build(name: str, regime: str) -> nn.Module:
    library, slash, plain = name.partition("/")
    return workloads.load(library, plain) if slash else roadmap.create_step(name, regime)


def _speeds(name: str, regime: str, fused: bool, size: int, rounds: int) -> tuple[str, str, str]:
    """Images/s of eager, and of this package if it computes something, and how they compare."""
    torch.manual_seed(0)
    model = _build(name, regime).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)

    def eager() -> object:
        with use_backend("eager"):
            return model(x)

    candidates = {"eager": eager} | ({"ours": lambda: model(x)} if fused else {})
    with steady_allocator():
        times = {who: t.median for who, t in interleave(candidates, rounds=rounds).items()}
    rates = {who: f"{1e3 / t:.1f}" for who, t in times.items()}
    return rates["eager"], rates.get("ours", "-"), speedup(times["eager"] / times["ours"]) if fused else "-"


def networks(
    regime: str,
    names: tuple[str, ...] = (),
    settings: dict[str, int] | None = None,
    advance: Callable[[str, int], None] = lambda *_: None,
) -> Table:
    """A row for each network of `regime`, or for those called `names`; below it what is odd, and how it was measured.

    ClickException for an unknown name suggests others. With `settings` (size, rounds) their speed is measured.
    """
    every = [*roadmap.list_steps(), *(name for others in OTHERS.values() for name in others)]
    options.check_names("--step: unknown step", names, every)
    figures = {row.title: row.regimes[regime] for row in published.roadmap()}
    known = {step.name: (step.title, step.title) for step in roadmap.STEPS}
    known |= {name: (name, title) for name, title in OTHERS[regime].items()}
    rows, notes = [], []
    for name, (title, printed) in known.items():
        if names and name not in names:
            continue
        with torch.device("meta"):
            model = _build(name, regime)
        counted, paper = count(model), figures.get(printed)
        gflops, fused = counted.multiply_adds / 1e9, sum(row.fused for row in acceleration_report(model).rows)
        cells = ("-", "-", f"{gflops:.3f}", "-")
        if paper:
            differs = paper.gflops.deviation(gflops)
            cells = (paper.top1.text, paper.gflops.text, f"{gflops:.3f}", f"{differs:+.2%}")
            if abs(differs) > SHARE:
                notes.append(f"* {title}: {NOTES.get((name, regime), 'differs from the published GFLOPs')}")
                title += " *"
        speeds = _speeds(name, regime, fused > 0, **settings) if settings else ()
        rows.append((title, *cells, f"{counted.parameters / 1e6:.1f}", str(fused or "-"), *speeds))
        advance(f"{regime} {name}", 1)
    columns = ("step", "top-1 %", "GFLOPs", "counted", "differs", "M params", "fused modules")
    if settings:
        columns += ("images/s eager", "images/s accelerated", "vs eager")
        notes.append(
            "images/s: medians of {rounds} rounds, batch 1, {size} x {size}, fp32, channels_last, random "
            "weights. accelerated: the same network with the kernels of this package; '-': they compute nothing in "
            "it.".format(**settings)
        )
    title = f"{TITLES[regime]}: top-1 and GFLOPs (multiply-adds) as published; GFLOPs and params counted"
    return Table(title, columns, rows, "\n".join(notes))


def chart(table: Table) -> "Figure":
    """Bars: published accuracy, beside the counted GFLOPs."""
    from matplotlib.figure import Figure

    shown = [row for row in table.rows if row[1] != "-"]
    accuracy = [float(row[1]) for row in shown]
    figure = Figure(figsize=(6.4, 1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([f"{row[0]}, {row[3]} GFLOPs" for row in shown], accuracy, color="#e4572e")
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.set_xlim(min(accuracy) - 1.5, max(accuracy) + 1)
    axes.invert_yaxis()
    axes.set_title("ImageNet-1k top-1, %, as published")
    return figure


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
    sections = {}
    for name in dict.fromkeys(regime):
        with options.progress_bar(name, None) as advance:
            table = networks(name, step, settings, advance)
        options.show(table, width=150)
        if folder is not None:
            figure = chart(table)
            figure.savefig(folder / f"roadmap-{name}.png", dpi=150, facecolor="white")
            sections[TITLES[name]] = [[("", figure)], table]
    if folder is not None:
        sections["Machine"] = machine(environment.collect())
        about = f"Accuracy and GFLOPs as published in arXiv 2201.03545 (tables 10 and 11), and counted here. {date()}"
        write_page(folder / NAME, "From ResNet to ConvNeXt", about, sections)
        click.echo(f"Written: {folder / NAME}, and a PNG of each chart beside it")
