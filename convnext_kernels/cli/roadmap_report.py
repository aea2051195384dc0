"""The networks of ``convnext-kernels roadmap``, and their report: charts, HTML page and JSON."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convnext_kernels.bench.charts import COLOURS, INK, SOFT, speedup, svg, templates
from convnext_kernels.cli.options import need, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"resnet50": "ResNet-50 to ConvNeXt-T", "resnet200": "ResNet-200 to ConvNeXt-B"}  # by regime


@dataclass(frozen=True)
class Speed:
    """Milliseconds per batch: (minimum, median); `accelerated` is None if the package replaces nothing."""

    eager: tuple[float, float]
    accelerated: tuple[float, float] | None


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
    note: str = ""
    adopted: bool = True
    step: bool = True  # False: another network, for comparison
    speed: Speed | None = None


def content(results: dict[str, list[Row]], settings: dict[str, int] | None, machine: dict[str, object]) -> object:
    """Everything as plain values for JSON."""
    return plain({"measured": settings, "machine": machine, "regimes": results})


def chart(rows: list[Row], title: str) -> "Figure":
    """Bars: published accuracy; markers on a second axis: counted and published GFLOPs."""
    Figure = need("matplotlib.figure", "--report").Figure
    shown = [row for row in rows if row.top1]
    figure = Figure(figsize=(9, 0.36 * len(shown) + 1.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    accuracy = [float(row.top1) for row in shown]
    colours = [COLOURS["accelerated"] if row.step and row.adopted else COLOURS["eager"] for row in shown]
    bars = axes.barh(places, accuracy, 0.68, color=colours)
    axes.bar_label(bars, [row.top1 for row in shown], padding=3, fontsize=9, color=INK)
    axes.set_yticks(places, [row.title for row in shown], fontsize=9)
    axes.set_xlim(min(accuracy) - 1.5, max(accuracy) + 1)
    axes.set_xlabel("ImageNet-1k top-1, %, as published", fontsize=9, color=INK)
    axes.invert_yaxis()
    costs = axes.twiny()
    costs.plot([row.gflops for row in shown], places, "D", color=INK, markersize=5, label="counted here")
    published = [(float(row.published), place) for place, row in zip(places, shown, strict=True)]
    costs.plot(
        *zip(*published, strict=True), "o", color=INK, fillstyle="none", markersize=9, label="published in the paper"
    )
    most = max(max(row.gflops, float(row.published)) for row in shown)
    costs.set_xlim(-2.2 * most, 1.08 * most)  # keeps the markers right of the middle, where the bars differ in length
    costs.set_xticks([tick for tick in costs.get_xticks() if 0 <= tick <= most])
    costs.set_xlabel("GFLOPs (multiply-adds)", fontsize=9, color=INK, loc="right")
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower right", labelcolor=SOFT)
    for side in (axes, costs):
        side.spines[["right"]].set_visible(False)
        side.tick_params(labelsize=8)
    axes.tick_params(axis="y", labelsize=9, length=0)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    return figure


def write(
    results: dict[str, list[Row]], settings: dict[str, int] | None, machine: dict[str, object], folder: Path
) -> list[Path]:
    """Write roadmap.html, roadmap.json and a PNG for each regime to `folder`; OSError if that fails."""
    from convnext_kernels import environment

    charts = {regime: chart(rows, TITLES[regime]) for regime, rows in results.items()}
    page = templates("convnext_kernels.cli").get_template("roadmap.html.jinja")
    html = page.render(
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        regimes=[
            {"title": TITLES[regime], "rows": rows, "chart": svg(charts[regime])} for regime, rows in results.items()
        ],
        settings=settings,
        speedup=speedup,
        machine=environment.rows(machine),
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "roadmap.html", folder / "roadmap.json"]
    files[0].write_text(html, encoding="utf-8")
    files[1].write_text(json.dumps(content(results, settings, machine), indent=2) + "\n", encoding="utf-8")
    for regime, figure in charts.items():
        files.append(folder / f"roadmap-{regime}.png")
        figure.savefig(files[-1], dpi=150, facecolor="white")
    return files
