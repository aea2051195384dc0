"""Charts of the reports; matplotlib is imported only by the functions that draw."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from convnext_kernels.bench.results import OURS, Run
from convnext_kernels.bench.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"eager": "#8d99ae", "accelerated": "#e4572e", "best peer": "#3d5a80"}
INK, SOFT, LINE = "#1f2933", "#5f6c7b", "#dde3ea"


def _axes(height: float, title: str, grid: str = "x") -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=LINE, linewidth=0.6)
    return figure, axes


def bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    form: Callable[[float], str] = number,
    ratios: bool = False,
    limit: float | None = None,
) -> "Figure":
    """Horizontal bars with their values, a group for each label and a colour for each series; None: no bar.

    `ratios`: bars begin at 1, on a logarithmic axis. `limit`: a dashed line.
    """
    figure, axes = _axes(0.9 + len(labels) * (0.12 + 0.14 * len(series)), title)
    height, start = 0.84 / len(series), 1 if ratios else 0
    if ratios:
        axes.set_xscale("log", base=2)
        axes.axvline(1, color=INK, linewidth=0.9)
    for index, (name, values) in enumerate(series.items()):
        places = [row + (index - (len(series) - 1) / 2) * height for row in range(len(labels))]
        known = [value is not None and math.isfinite(value) for value in values]
        lengths = [value - start if ok else 0 for value, ok in zip(values, known, strict=True)]
        drawn = axes.barh(places, lengths, 0.92 * height, left=start, color=COLOURS.get(name, SOFT), label=name)
        texts = ["" if value is None else form(value) for value in values]
        axes.bar_label(drawn, texts, padding=3, fontsize=7, color=INK)
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
    if ratios:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{max(value, 1 / value):.3g}x"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.16, y=0.02)
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    if len(series) > 1:
        figure.legend(frameon=False, fontsize=8, ncols=len(series), loc="outside lower left")
    return figure


def scaling(run: Run) -> "list[tuple[str, Figure]]":
    """Cost of an image by batch size and by image size: flat where it grows linearly. Empty without such cases."""
    found = []
    for caption, by_batch in (("images per batch, 224x224 each", True), ("pixels of a single image", False)):
        curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for r in run.records:
            if r.group != "scaling" or not r.times:
                continue
            size, threads = r.what.split(" ", 1)
            if (size == "224") if by_batch else (r.batch == 1):
                cost = r.times.median / r.batch * (224 / int(size)) ** 2
                points = curves.setdefault((r.candidate, threads), [])
                points.append((r.batch if by_batch else int(size) ** 2, cost))
        if not curves:
            continue
        figure, axes = _axes(3.2, "milliseconds of a ConvNeXt-T per 224 x 224 pixels", "both")
        for (candidate, threads), points in curves.items():
            name = "accelerated" if candidate == OURS else "eager"
            line = "--" if threads.startswith("1 ") else "-"
            points = zip(*sorted(points), strict=True)
            axes.plot(*points, line, marker="o", color=COLOURS[name], label=f"{name}, {threads}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        found.append((f"cost by {caption}", figure))
    return found
