"""``convnext-kernels roadmap``: every step from ResNet to ConvNeXt, as published, counted and measured."""

import click
import torch

from convnext_kernels import acceleration_report, use_backend
from convnext_kernels.bench.tables import Table, speedup
from convnext_kernels.bench.timing import interleave, steady_allocator
from convnext_kernels.cli import options
from convnext_kernels.models import published, roadmap
from convnext_kernels.models.counting import count

TITLES = {"resnet50": "ResNet-50 to ConvNeXt-T", "resnet200": "ResNet-200 to ConvNeXt-B"}  # by regime
SHARE = 0.015  # allowed difference from the published GFLOPs
# Figures that the paper's description cannot give, by (step, regime).
NOTES = {
    ("layer_norm", "resnet50"): "published 4.46, but a LayerNorm counts what a BatchNorm does: the described network "
    "has the multiply-adds of the row above it, as in the ResNet-200 column (14.81 twice)",
}


def _speeds(step: str, regime: str, fused: bool, size: int, rounds: int) -> tuple[str, str, str]:
    """Images/s of eager, and of this package if it computes something, and how they compare."""
    torch.manual_seed(0)
    model = roadmap.create_step(step, regime).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)

    def eager() -> object:
        with use_backend("eager"):
            return model(x)

    candidates = {"eager": eager} | ({"ours": lambda: model(x)} if fused else {})
    with steady_allocator():
        times = {who: t.median for who, t in interleave(candidates, rounds=rounds).items()}
    rates = {who: f"{1e3 / t:.1f}" for who, t in times.items()}
    return rates["eager"], rates.get("ours", "-"), speedup(times["eager"] / times["ours"]) if fused else "-"


def networks(regime: str, names: tuple[str, ...], settings: dict[str, int] | None) -> Table:
    """A row for each step of `regime`, or for those called `names`; below it what is odd, and how it was measured.

    With `settings` (size, rounds) their speed is measured.
    """
    figures = {row.title: row.regimes[regime] for row in published.roadmap()}
    rows, notes = [], []
    for step in roadmap.STEPS:
        if names and step.name not in names:
            continue
        with torch.device("meta"):
            model = roadmap.create_step(step.name, regime)
        counted, paper, title = count(model), figures[step.title], step.title
        gflops, fused = counted.multiply_adds / 1e9, sum(row.fused for row in acceleration_report(model).rows)
        differs = paper.gflops.deviation(gflops)
        if abs(differs) > SHARE:
            notes.append(f"* {title}: {NOTES.get((step.name, regime), 'differs from the published GFLOPs')}")
            title += " *"
        cells = (paper.top1.text, paper.gflops.text, f"{gflops:.3f}", f"{differs:+.2%}")
        speeds = _speeds(step.name, regime, fused > 0, **settings) if settings else ()
        rows.append((title, *cells, f"{counted.parameters / 1e6:.1f}", str(fused or "-"), *speeds))
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


@click.command("roadmap")
@click.option("--regime", type=click.Choice(list(TITLES)), multiple=True, default=tuple(TITLES), help="Of the paper.")
@click.option("--step", type=click.Choice(roadmap.list_steps()), multiple=True, metavar="NAME", help="Only this step.")
@click.option("--measure", is_flag=True, help="Time every network in fp32, eager and accelerated.")
@options.count("--size", 224, "Height and width, for --measure.", least=32)
@options.count("--rounds", 5, "Timed rounds, for --measure.")
@options.threads
def command(regime: tuple[str, ...], step: tuple[str, ...], measure: bool, size: int, rounds: int) -> None:
    """Show every step from ResNet to ConvNeXt.

    Accuracy and GFLOPs as published, GFLOPs and parameters as counted here, and with --measure the speed here.
    """
    for name in dict.fromkeys(regime):
        options.show(networks(name, step, {"size": size, "rounds": rounds} if measure else None), width=150)
