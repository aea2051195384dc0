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
ROUNDS = 5


def _speeds(name: str, regime: str) -> tuple[str, str, str]:
    """Images/s of a step's network with PyTorch's operators and with these kernels, fp32, batch 1; how they compare."""
    torch.manual_seed(0)
    model = roadmap.create_step(name, regime).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def eager() -> torch.Tensor:
        with use_backend("eager"):
            return model(x)

    with steady_allocator():
        times = interleave({"eager": eager, "ours": lambda: model(x)}, rounds=ROUNDS)
    slow, fast = times["eager"].median, times["ours"].median
    return f"{1e3 / slow:.1f}", f"{1e3 / fast:.1f}", speedup(slow / fast)


def networks(regime: str, measure: bool) -> Table:
    """A row for each step of `regime`, with its speed here if `measure`."""
    figures = {row.title: row.regimes[regime] for row in published.roadmap()}
    rows = []
    for step in roadmap.STEPS:
        with torch.device("meta"):
            model = roadmap.create_step(step.name, regime)
        counted, paper = count(model), figures[step.title]
        gflops, fused = counted.multiply_adds / 1e9, sum(row.fused for row in acceleration_report(model).rows)
        cells = (paper.top1.text, paper.gflops.text, f"{gflops:.3f}", f"{paper.gflops.deviation(gflops):+.2%}")
        speeds = _speeds(step.name, regime) if measure else ()
        rows.append((step.title, *cells, f"{counted.parameters / 1e6:.1f}", str(fused or "-"), *speeds))
    columns = ("step", "top-1 %", "GFLOPs", "counted", "differs", "M params", "fused modules")
    columns += ("images/s eager", "images/s accelerated", "vs eager") if measure else ()
    title = f"{TITLES[regime]}: top-1 and GFLOPs (multiply-adds) as published; GFLOPs and params counted"
    return Table(title, columns, rows)


@click.command("roadmap")
@click.option("--regime", type=click.Choice(list(TITLES)), multiple=True, default=tuple(TITLES), help="Of the paper.")
@click.option(
    "--measure", is_flag=True, help="Also time every network, eager and accelerated: fp32, 224 x 224, batch 1."
)
@options.threads
def command(regime: tuple[str, ...], measure: bool) -> None:
    """Show every step from ResNet to ConvNeXt.

    Accuracy and GFLOPs as published, GFLOPs and parameters as counted, and with --measure the speed here.
    """
    for name in dict.fromkeys(regime):
        options.show(networks(name, measure), width=150 if measure else 110)
