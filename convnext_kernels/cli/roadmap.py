"""``convnext-kernels roadmap``: every step from ResNet to ConvNeXt, as published and counted."""

import click
import torch

from convnext_kernels import acceleration_report
from convnext_kernels.bench.tables import Table
from convnext_kernels.cli import options
from convnext_kernels.models import published, roadmap
from convnext_kernels.models.counting import count

TITLES = {"resnet50": "ResNet-50 to ConvNeXt-T", "resnet200": "ResNet-200 to ConvNeXt-B"}  # by regime


def networks(regime: str) -> Table:
    """A row for each step of `regime`."""
    figures = {row.title: row.regimes[regime] for row in published.roadmap()}
    rows = []
    for step in roadmap.STEPS:
        with torch.device("meta"):
            model = roadmap.create_step(step.name, regime)
        counted, paper = count(model), figures[step.title]
        gflops, fused = counted.multiply_adds / 1e9, sum(row.fused for row in acceleration_report(model).rows)
        cells = (paper.top1.text, paper.gflops.text, f"{gflops:.3f}", f"{paper.gflops.deviation(gflops):+.2%}")
        rows.append((step.title, *cells, f"{counted.parameters / 1e6:.1f}", str(fused or "-")))
    columns = ("step", "top-1 %", "GFLOPs", "counted", "differs", "M params", "fused modules")
    title = f"{TITLES[regime]}: top-1 and GFLOPs (multiply-adds) as published; GFLOPs and params counted"
    return Table(title, columns, rows)


@click.command("roadmap")
@click.option("--regime", type=click.Choice(list(TITLES)), multiple=True, default=tuple(TITLES), help="Of the paper.")
def command(regime: tuple[str, ...]) -> None:
    """Show every step from ResNet to ConvNeXt: accuracy and GFLOPs as published, GFLOPs and parameters as counted."""
    options.show(*map(networks, dict.fromkeys(regime)), width=110)
