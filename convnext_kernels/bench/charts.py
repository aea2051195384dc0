"""Charts of the reports; matplotlib is imported only by the functions that draw."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from convnext_kernels.bench.results import EAGER, OURS, Record, Run
from convnext_kernels.bench.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"eager": "#8d99ae", "accelerated": "#e4572e", "best peer": "#3d5a80"}
INK, SOFT, LINE = "#1f2933", "#5f6c7b", "#dde3ea"
DTYPES = {"fp32": "#1d3557", "tf32": "#7b4fa3", "bf16": "#e4572e", "fp16": "#2a9d8f"}
MARKERS = {"dwconv": "o", "mlp": "s", "block": "D", "model": "^"}


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


def scaling_curves(run: Run) -> dict[str, dict[tuple[str, str], list[tuple[float, float]]]]:
    """{"batch" or "pixels": {(candidate, threads): [(images or pixels, milliseconds per 224 x 224 pixels)]}}.

    A flat curve means that the cost grows linearly.
    """
    found: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {"batch": {}, "pixels": {}}
    for record in run.records:
        if record.group != "scaling" or not record.times:
            continue
        size, threads = record.what.split(" ", 1)
        cost = record.times.median / record.batch * (224 / int(size)) ** 2
        if size == "224":
            found["batch"].setdefault((record.candidate, threads), []).append((record.batch, cost))
        if record.batch == 1:
            found["pixels"].setdefault((record.candidate, threads), []).append((int(size) ** 2, cost))
    return {name: {key: sorted(points) for key, points in curves.items()} for name, curves in found.items()}


def scaling(run: Run) -> "list[tuple[str, Figure]]":
    """Cost of an image by batch size and by image size; empty without such cases."""
    names = {"batch": "images per batch, 224x224 each", "pixels": "pixels of a single image"}
    found = []
    for kind, curves in scaling_curves(run).items():
        if not curves:
            continue
        figure, axes = _axes(3.2, "milliseconds of a ConvNeXt-T per 224 x 224 pixels", "both")
        for (candidate, threads), points in curves.items():
            name = "accelerated" if candidate == OURS else "eager"
            line = "--" if threads.startswith("1 ") else "-"
            axes.plot(*zip(*points, strict=True), line, marker="o", color=COLOURS[name], label=f"{name}, {threads}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        found.append((f"cost by {names[kind]}", figure))
    return found


def roofline_points(run: Run) -> list[tuple[Record, Record | None]]:
    """Records (ours, eager) of every case that has FLOPs and a time of this package."""
    found = [(case.get(OURS), case.get(EAGER)) for case in run.cases().values()]
    return [
        (ours, eager if eager is not None and eager.times else None)
        for ours, eager in found
        if ours is not None and ours.times and ours.flops and ours.bytes and ours.group != "scaling"
    ]


def roofline(run: Run) -> "Figure | None":
    """Every case of this package under the measured roofs, joined by a line to eager; None without any."""
    points = roofline_points(run)
    if not points:
        return None
    figure, axes = _axes(5.2, "GFLOP/s by FLOP per byte of the least traffic", "both")
    labels: dict[str, object] = {}
    for ours, eager in points:
        x = (ours.flops - ours.padding_flops) / ours.bytes
        look = {"marker": MARKERS.get(ours.group, "o"), "color": DTYPES.get(ours.dtype, INK), "linestyle": ""}
        label = f"{ours.group}, {ours.dtype}"
        labels[label] = axes.plot(x, ours.needed_gflops, markersize=5, label=label, zorder=3, **look)[0]
        if eager is not None:
            axes.plot(x, eager.needed_gflops, markersize=3, fillstyle="none", **look)
            axes.plot([x, x], [eager.needed_gflops, ours.needed_gflops], color=look["color"], linewidth=0.4)
    axes.set(xscale="log", yscale="log")
    left, right = axes.get_xlim()
    flops = {name: rate / 1e9 for name, rate in run.ceilings.get("flops", {}).items()}
    top = max(flops.values(), default=math.inf)
    for name, rate in flops.items():
        style = "--" if name == "vector" else "-"
        text = f"{'fp32 without matrix units' if name == 'vector' else name}: {number(rate)} GFLOP/s"
        labels[text] = axes.axhline(rate, color=DTYPES.get(name, SOFT), linestyle=style, linewidth=1.1, label=text)
    for level in run.ceilings.get("memory", []):
        rate, end = level["rate"] / 1e9, min(right, top / (level["rate"] / 1e9))
        text = f"{level['level']}: {number(rate)} GB/s"
        style = {"linewidth": 1.1, "linestyle": {"L2": "-.", "L3": ":"}.get(level["level"], "-")}
        labels[text] = axes.plot([left, end], [left * rate, end * rate], color=SOFT, label=text, **style)[0]
    figure.legend(handles=list(labels.values()), frameon=False, fontsize=7.5, ncols=3, loc="outside lower left")
    return figure
