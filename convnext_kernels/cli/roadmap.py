"""``convnext-kernels roadmap``: from ResNet to ConvNeXt, the papers' figures beside what is counted and measured."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.cli import options

if TYPE_CHECKING:
    from torch import nn

    from convnext_kernels.models.published import Regime

SHARE = 0.015  # of the printed GFLOPs that ours may differ by
TITLES = {"resnet50": "ResNet-50 to ConvNeXt-T", "resnet200": "ResNet-200 to ConvNeXt-B"}
# Whatever cannot be met from the paper's description, by (step, regime).
NOTES = {
    ("layer_norm", "resnet50"): "printed 4.46, but a LayerNorm counts what a BatchNorm does: the described network "
    "has the multiply-adds of the row above it, as in the ResNet-200 column (14.81 twice)",
}
# Networks to compare with, by regime: (name as their library has it, row of the paper's table or "").
PEERS = {
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


@dataclass(frozen=True)
class Speed:
    """Milliseconds a batch; what is accelerated may be nothing (None)."""

    eager: tuple[float, float]  # minimum, median
    accelerated: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A network."""

    name: str
    title: str
    top1: str | None  # as published
    printed: str | None  # GFLOPs
    gflops: float
    parameters: float  # millions
    fused: int  # modules that this package's kernels compute
    note: str = ""
    adopted: bool = True
    peer: bool = False
    speed: Speed | None = None


def _peer(name: str) -> "nn.Module":
    library, _, plain = name.partition("/")
    if library == "torchvision":
        return options.need("torchvision.models", "roadmap").get_model(plain, weights=None)
    return options.need("timm", "roadmap").create_model(plain, pretrained=False)


def networks(regime: str, names: tuple[str, ...] = ()) -> "list[tuple[Row, Callable[[], nn.Module]]]":
    """Return the rows of `regime`, or those called `names`, counted, each with what builds its network.

    ClickException for an unknown name, with the near ones.
    """
    import torch

    from convnext_kernels import acceleration_report
    from convnext_kernels.models import published, roadmap
    from convnext_kernels.models.convnext import near
    from convnext_kernels.models.counting import count

    known = [*roadmap.list_steps(), *dict.fromkeys(name for peers in PEERS.values() for name, _ in peers)]
    for name in names:
        if name not in known:
            raise click.ClickException(f"--step: unknown step {name!r}; {near(name, known)}")
    printed = {row.title: row.regimes[regime] for row in published.roadmap()}

    def row(name: str, title: str, figures: "Regime | None", build: "Callable[[], nn.Module]", **more: object) -> Row:
        with torch.device("meta"):
            model = build()
        counted = count(model)
        fused = sum(r.fused for r in acceleration_report(model).rows)
        top1, gflops = (figures.top1.text, figures.gflops) if figures else (None, None)
        ours, note = counted.multiply_adds / 1e9, ""
        if gflops and abs(gflops.deviation(ours)) > SHARE:
            note = NOTES.get((name, regime), "not the printed GFLOPs")
        return Row(*(name, title, top1, gflops and gflops.text, ours, counted.parameters / 1e6, fused, note), **more)

    found = []
    for step in roadmap.STEPS:
        if names and step.name not in names:
            continue

        def build(step: str = step.name) -> "nn.Module":
            return roadmap.create_step(step, regime)

        found.append((row(step.name, step.title, printed[step.title], build, adopted=step.adopted), build))
    for name, title in PEERS[regime]:
        if names and name not in names:
            continue

        def build(name: str = name) -> "nn.Module":
            return _peer(name)

        found.append((row(name, name, printed.get(title), build, peer=True), build))
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


def _table(rows: list[Row], regime: str, batch: int) -> object:
    from rich.table import Table
    from rich.text import Text

    measured = any(row.speed for row in rows)
    table = Table(title=f"{TITLES[regime]}: top-1 and GFLOPs (multiply-adds) as printed, ours counted")
    table.add_column("step", overflow="fold")
    for name in ("top-1 %", "GFLOPs", "ours", "differs", "M params", "fused modules"):
        table.add_column(name, justify="right")
    if measured:
        for name in ("eager", "accelerated", "times faster"):
            table.add_column(name if name.startswith("times") else f"images/s {name}", justify="right")
    for row in rows:
        differs = "-" if row.printed is None else f"{row.gflops / float(row.printed) - 1:+.2%}"
        cells: list[str | Text] = [
            *(Text(row.title + " *" * bool(row.note)), row.top1 or "-", row.printed or "-", f"{row.gflops:.3f}"),
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
    return [*cells, f"{1e3 * batch / speed.accelerated[1]:.1f}", f"{speed.eager[1] / speed.accelerated[1]:.2f}x"]


@click.command("roadmap")
@click.option(
    "--regime",
    "regimes",
    type=click.Choice(list(TITLES)),
    multiple=True,
    default=tuple(TITLES),
    show_default=True,
    help="Column of the paper; may be repeated.",
)
@click.option("--step", "names", multiple=True, metavar="NAME", help="Only this step or network; may be repeated.")
@click.option("--measure", is_flag=True, help="Time every network here, eager and on this package's kernels, fp32.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="With --measure.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Images' side, --measure.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="With --measure.")
@options.threads
@click.option("--report", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Charts, HTML, JSON.")
def command(
    regimes: tuple[str, ...],
    names: tuple[str, ...],
    measure: bool,
    batch: int,
    size: int,
    rounds: int,
    threads: int | None,
    folder: Path | None,
) -> None:
    """Show every step from ResNet to ConvNeXt: published accuracy, printed and counted GFLOPs, speed here."""
    if folder is not None:
        options.check_writable(folder / "roadmap.html", "--report")
    import dataclasses

    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # of a file or a pipe nobody knows the width
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
        console.print(_table(results[regime], regime, batch), highlight=False)
        for row in results[regime]:
            if row.note:
                console.print(f"* {row.title}: {row.note}", highlight=False)
    settings = {"batch": batch, "size": size, "rounds": rounds} if measure else None
    if measure:
        console.print(
            f"images/s: medians of {rounds} rounds, batch {batch}, {size} x {size}, fp32, channels_last, random "
            "weights; accelerated: the same network with the kernels of this package; '-': it has none to use",
            highlight=False,
        )
    if folder is not None:
        from convnext_kernels.cli.roadmap_report import write

        for file in write(results, settings, folder):
            console.print(f"written: {file}", highlight=False)


def as_json(results: dict[str, list[Row]], settings: dict[str, int] | None, machine: dict[str, object]) -> str:
    """Everything as JSON text."""
    content = {regime: [asdict(row) for row in rows] for regime, rows in results.items()}
    return json.dumps({"measured": settings, "machine": machine, "regimes": content}, indent=2) + "\n"
