"""Charts of the reports; matplotlib and jinja2 are imported only by the functions that use them."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convnext_kernels.bench.results import EAGER, OURS, Ratio, Record, Run

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"eager": "#8d99ae", "accelerated": "#e4572e"}
PEER = "#3d5a80"
INK, SOFT, LINE = "#1f2933", "#5f6c7b", "#dde3ea"
WIN, LOSS = ("#9fd3c7", "#1f7a6d"), ("#f0b5ad", "#a4161a")  # (against eager, against the best peer)
DTYPES = {"fp32": "#1d3557", "tf32": "#7b4fa3", "bf16": "#e4572e", "fp16": "#2a9d8f"}
MARKERS = {"dwconv": "o", "mlp": "s", "block": "D", "model": "^"}

PANEL = 5.2  # inches: at this width the text of a panel is as large as the text around it


def svg(figure: "Figure") -> str:
    """Return the figure as an inline ``<svg>`` element with real text, without prolog, metadata or a fixed size."""
    from matplotlib import rc_context

    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    found = text.getvalue()
    found = re.sub(r'<g id="[^"]*"', "<g", found[found.index("<svg") :])  # ids must not repeat in a page
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 width="100%"', found, count=1)


def templates(package: str) -> "Environment":
    """Return the jinja environment of the templates of `package`."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(value: float) -> str:
    """Format with three significant digits, but all digits before the point, and no exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def short(candidate: str) -> str:
    """Return the distinctive part of a name: "max-autotune" of "torch.compile, max-autotune"."""
    return candidate.rpartition(", ")[2]


def speedup(factor: float, than: str = "") -> str:
    """Format a speed-up: "1.35x faster" or, with `than`, "1.35 times faster than eager".

    `factor` is the time of `than` over the time of this package; below 1 the text is "1.11x slower".
    """
    times, verb = number(max(factor, 1 / factor)), "faster" if factor > 1 else "slower"
    if math.isclose(factor, 1, rel_tol=1e-3):
        return f"as fast as {than}" if than else "as fast"
    return f"{times} times {verb} than {than}" if than else f"{times}x {verb}"


@dataclass(frozen=True)
class RatioRow:
    """One case of a chart of speed-ups."""

    what: str
    to_eager: Ratio | None
    to_peer: Ratio | None
    peer: str  # name of the best peer; without times, the reason


@dataclass(frozen=True)
class ModelRow:
    """One model of the chart of models, in images/s; None: no time."""

    what: str
    rival: bool
    eager: float | None
    peer: float | None
    peer_name: str
    ours: float | None
    flops: int  # per image
    parameters: int | None


@dataclass(frozen=True)
class Panel:
    """A chart with the rows of one dtype, batch and direction."""

    title: str
    rows: "Sequence[RatioRow | ModelRow]"


def _places(rows: "Sequence[RatioRow | ModelRow]", gap: float) -> list[float]:
    """Vertical positions of the rows, from 0 downwards, with a gap of `gap` rows before another shape or model."""
    places, at, before = [], 0.0, None
    for row in rows:
        words = row.what.split(" ")
        key = words[-2:] if len(words) > 2 else words[:1]
        at += 0 if before is None else 1 if key == before else 1 + gap
        places.append(at)
        before = key
    return places


def _grid(
    panels: Sequence[Panel],
    left: float,
    right: float,
    row: float,
    gap: float,
    columns: int,
    legend: Sequence[tuple[str, str]],
    heading: str,
) -> "tuple[Figure, list[tuple[Axes, list[float]]]]":
    """A figure and, for every panel, (axes, places of the rows); a legend of (colour, meaning) adds a heading.

    The layout is computed here, so that all panels have the same row height and the same left and right edges.
    `left` and `right` are the widths of the text beside the bars, `row` is the height of a row, in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    title, ticks, head = 0.5, 0.3, 0.62 if legend else 0.0
    places = [_places(panel.rows, gap) for panel in panels]
    lengths = [row * (at[-1] + 1.5) for at in places]
    lines = [max(lengths[i : i + columns]) + title + ticks for i in range(0, len(panels), columns)]
    width, height = PANEL * columns, sum(lines) + head
    figure = Figure(figsize=(width, height))
    if legend:
        handles = [Patch(color=colour, label=label) for colour, label in legend]
        corner = {"loc": "upper left", "bbox_to_anchor": (0.05 / width, 1 - 0.3 / height), "borderaxespad": 0}
        figure.legend(handles=handles, frameon=False, fontsize=8, ncols=2 * columns, **corner)
        figure.text(0.1 / width, 1 - 0.22 / height, heading, fontsize=11, color=INK, weight="bold")
    found = []
    for index, (panel, at, length) in enumerate(zip(panels, places, lengths, strict=True)):
        line, column = divmod(index, columns)
        x, y = PANEL * column, height - head - sum(lines[:line]) - title - length
        size = PANEL - left - right
        axes = figure.add_axes(((x + left) / width, y / height, size / width, length / height))
        axes.set_ylim(at[-1] + 0.75, -0.75)
        figure.text(
            (x + 0.1) / width, (y + length + 0.22) / height, panel.title, fontsize=9.5, color=INK, weight="bold"
        )
        axes.set_yticks(at, [row.what for row in panel.rows], fontsize=7.5, color=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(SOFT)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=7, colors=SOFT)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        found.append((axes, at))
    return figure, found


def _width(texts: Iterable[str]) -> float:
    """Width in inches of the longest of `texts` at 7.5 points."""
    return 0.066 * max(map(len, texts), default=0)


RATIO_LEGEND = (
    (WIN[0], "faster than eager"),
    (WIN[1], "faster than the best peer"),
    (LOSS[0], "slower than eager"),
    (LOSS[1], "slower than the best peer"),
)


def _ratio_limits(rows: Sequence[RatioRow]) -> tuple[float, float]:
    found = [ratio for row in rows for ratio in (row.to_eager, row.to_peer) if ratio is not None]
    ends = [end for ratio in found for end in (ratio.value, ratio.low, ratio.high)]
    return min([0.8, *(end / 1.08 for end in ends)]), max([1.5, *(end * 1.08 for end in ends)])


def ratios(name: str, group: Sequence[Panel], only: Panel | None = None) -> "Figure":
    """Bars of speed-ups that begin at "as fast" on a logarithmic axis: wide over eager, narrow over the best peer.

    Draws all panels of the group `name`, or `only` one of them in the same scale. The numbers are columns beside the
    bars, so that no bar can cover them.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panels, columns, legend = ([only], 1, ()) if only else (group, min(2, len(group)), RATIO_LEGEND)
    rows = [row for panel in group for row in panel.rows]
    limits = _ratio_limits(rows)
    octaves = math.log2(limits[1] / limits[0])  # few enough ticks that their labels do not overlap
    ticks = (0.5, 0.75, 1, 1.5, 2) if octaves < 1.8 else [2.0**i for i in range(-20, 21, 1 if octaves < 6 else 2)]
    texts = [speedup(ratio.value) for row in rows for ratio in (row.to_eager, row.to_peer) if ratio is not None]
    column = 72 * _width([*texts, "vs eager"]) + 4  # points
    left = 0.14 + _width(row.what for row in rows)
    right = 2 * column / 72 + 0.1 + 0.95 * _width(short(row.peer) for row in rows)
    heading = f"{name}: times slower (left) or faster (right)"
    figure, grid = _grid(panels, left, right, 0.148, 0.5, columns, legend, heading)
    for panel, (axes, places) in zip(panels, grid, strict=True):
        axes.set_xscale("log")
        axes.set_xlim(limits)
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{max(value, 1 / value):.3g}x"))
        beside = {"textcoords": "offset points", "va": "center", "annotation_clip": False, "parse_math": False}
        head = {**beside, "xycoords": "axes fraction", "fontsize": 7, "color": SOFT}
        axes.annotate("vs eager", (1, 1), (column, 5), ha="right", **head)
        axes.annotate("vs best peer", (1, 1), (column + 12, 5), ha="left", **head)
        for place, row in zip(places, panel.rows, strict=True):
            text = {**beside, "xycoords": ("axes fraction", "data"), "fontsize": 7.5, "color": INK}
            if row.to_peer is None:
                axes.annotate(row.peer, (1, place), (8, 0), ha="left", **{**text, "color": LOSS[1]})
                continue
            for kind, (ratio, height) in enumerate(((row.to_eager, 0.84), (row.to_peer, 0.4))):
                if ratio is not None:
                    colour = (WIN if ratio.value >= 1 else LOSS)[kind]
                    axes.barh(place, ratio.value - 1, height, left=1, color=colour)
            peer = row.to_peer
            axes.plot([peer.low, peer.high], [place, place], color=INK, linewidth=0.7, solid_capstyle="butt")
            if row.to_eager is not None:
                colour = INK if row.to_eager.value >= 1 else LOSS[1]
                made = speedup(row.to_eager.value)
                axes.annotate(made, (1, place), (column, 0), ha="right", **{**text, "color": colour})
            colour = INK if peer.value >= 1 else LOSS[1]
            end = 2 * column
            axes.annotate(speedup(peer.value), (1, place), (end, 0), ha="right", **{**text, "color": colour})
            text |= {"color": SOFT, "fontsize": 7}
            axes.annotate(short(row.peer), (1, place), (end + 4, 0), ha="left", **text)
        axes.axvline(1, color=INK, linewidth=0.9)
    return figure


MODEL_LEGEND = ((COLOURS["eager"], "eager"), (PEER, "best peer, if not eager"), (COLOURS["accelerated"], "accelerated"))


def models(group: Sequence[Panel], only: Panel | None = None) -> "Figure":
    """Images per second of the models, a bar for each candidate; models that are no ConvNeXt are at the bottom.

    Draws all panels, or `only` one of them.
    """
    panels, columns, legend = ([only], 1, ()) if only else (group, min(2, len(group)), MODEL_LEGEND)
    left = 0.14 + _width(row.what for panel in group for row in panel.rows)
    figure, grid = _grid(panels, left, 0.1, 0.4, 0.1, columns, legend, "models: images/s")
    for panel, (axes, places) in zip(panels, grid, strict=True):
        for place, row in zip(places, panel.rows, strict=True):
            peer = row.peer if row.peer_name != EAGER else None
            bars = (("eager", row.eager), ("peer", peer), ("accelerated", row.ours))
            bars = [(name, value) for name, value in bars if value is not None]
            for index, (name, value) in enumerate(bars):
                at = place + 0.28 * (index - (len(bars) - 1) / 2)
                axes.barh(at, value, 0.26, color=COLOURS.get(name, PEER))
                label = f"{number(value)} {short(row.peer_name)}" if name == "peer" else number(value)
                axes.annotate(
                    label, (value, at), (3, 0), textcoords="offset points", va="center", fontsize=6.5, color=INK
                )
        rivals = [place for place, row in zip(places, panel.rows, strict=True) if row.rival]
        if rivals and len(rivals) < len(places):
            axes.axhline(rivals[0] - 0.58, color=SOFT, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_xlim(0, axes.dataLim.x1 * 1.3 or 1)
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


def scaling(run: Run) -> "Figure | None":
    """Cost of an image by batch size and by image size; None without such cases."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    curves = scaling_curves(run)
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(2 * PANEL, 3.4), layout="constrained")
    labels = {"batch": "images per batch, 224x224 each", "pixels": "height = width of a single image"}
    for axes, (name, found) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
        places = sorted({x for points in found.values() for x, _ in points})
        for (candidate, threads), points in found.items():
            ours = candidate == OURS
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS["accelerated" if ours else "eager"],
                linestyle="--" if threads.startswith("1 ") else "-",
                marker="o",
                markersize=3,
                linewidth=1.2,
                label=f"{'accelerated' if ours else candidate}, {threads}",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places, [str(x if name == "batch" else math.isqrt(x)) for x in places])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(labels[name], fontsize=8, color=INK)
        axes.tick_params(labelsize=7, colors=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=LINE, linewidth=0.5)
    figure.axes[0].set_ylabel("ms per 224 x 224 pixels", fontsize=8, color=INK)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def roofline_points(run: Run) -> list[tuple[Record, Record | None]]:
    """Records (ours, eager) of every case that has FLOPs and a time of this package."""
    cases = run.cases().values()
    found = [(case.get(OURS), case.get(EAGER)) for case in cases]
    return [
        (ours, eager if eager is not None and eager.times else None)
        for ours, eager in found
        if ours is not None and ours.times and ours.flops and ours.bytes and ours.group != "scaling"
    ]


def _roofs(axes: "Axes", run: Run, angle: float) -> None:
    """Draw the ceilings up to the axes' limits, each with its name; `angle` is the slope of the memory roofs."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    flops, memory = _ceilings(run)
    highest = max(flops.values(), default=top)
    # Names lie along their roofs: above it, but below the slowest one, because the next roof may be close above that.
    off = (-math.sin(math.radians(angle)), math.cos(math.radians(angle)))
    for index, (name, rate) in enumerate(memory):
        below = index == len(memory) - 1 and index > 0
        start = max(left, bottom / rate)
        axes.plot([start, highest / rate], [start * rate, highest], color=SOFT, linewidth=1.2)
        axes.annotate(
            f"{name}: {number(rate)} GB/s",
            (start, start * rate),
            tuple(
                (-3 if below else 3) * part + 14 / off[1] * along
                for part, along in zip(off, (off[1], -off[0]), strict=True)
            ),
            textcoords="offset points",
            fontsize=7.5,
            color=SOFT,
            va="top" if below else "bottom",
            rotation=angle,
            rotation_mode="anchor",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},  # covers other roofs
        )
    fastest = memory[0][1] if memory else math.inf
    placed = 0.0
    for name, rate in sorted(flops.items(), key=lambda item: item[1]):
        colour, style = DTYPES.get(name, SOFT), "--" if name == "fp32 vector" else "-"
        axes.plot([max(left, rate / fastest), right], [rate, rate], color=colour, linewidth=1.2, linestyle=style)
        placed = max(rate, placed * (top / bottom) ** 0.03)  # so that the names of close ceilings do not overlap
        axes.annotate(
            f"{name}: {number(rate)} GFLOP/s" if rate < 1e4 else f"{name}: {number(rate / 1e3)} TFLOP/s",
            (right, rate),
            (right * (right / left) ** 0.02, placed),
            fontsize=7.5,
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def _ceilings(run: Run) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Return GFLOP/s by name, and (name, GB/s) of the memory levels, fastest first."""
    levels = sorted(run.ceilings.get("memory", []), key=lambda level: -level["rate"])
    names = [
        level["level"] + ("" if level["size"] is None else f" (to {number(level['size'] / 2**20)} MiB)")
        for level in levels
    ]
    memory = [(name, level["rate"] / 1e9) for name, level in zip(names, levels, strict=True)]
    flops = {name: rate / 1e9 for name, rate in run.ceilings.get("flops", {}).items()}
    if flops.get("vector") == flops.get("fp32"):  # the same line: one name
        flops.pop("vector", None)
    elif "vector" in flops:
        flops["fp32 vector"] = flops.pop("vector")
    return flops, memory


def roofline(run: Run) -> "Figure | None":
    """Every case of this package under the measured roofs, joined by a line to eager; None without any."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = roofline_points(run)
    if not points:
        return None
    flops, memory = _ceilings(run)
    at = [(ours.flops - ours.padding_flops) / ours.bytes for ours, _ in points]
    heights = [record.needed_gflops for pair in points for record in pair if record is not None]
    left, right = min(at) / (14 if memory else 2), max(at) * 1.6  # space on the left for the names of the roofs
    bottom = min([min(heights) / 2, *(left * rate * 0.9 for _, rate in memory)])
    top = max([*heights, *flops.values()]) * 1.6

    width, height, box = 7.6, 5.6, (0.075, 0.135, 0.71, 0.85)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(box)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    rise, run_ = height * box[3] / math.log(top / bottom), width * box[2] / math.log(right / left)
    _roofs(axes, run, math.degrees(math.atan2(rise, run_)))
    for (ours, eager), x in zip(points, at, strict=True):
        colour, marker = DTYPES.get(ours.dtype, INK), MARKERS.get(ours.group, "o")
        if eager is not None:
            axes.plot(
                [x, x], [eager.needed_gflops, ours.needed_gflops], color=colour, linewidth=0.5, alpha=0.35, zorder=2
            )
            axes.plot(x, eager.needed_gflops, marker, markersize=3, fillstyle="none", color=colour, mew=0.6, zorder=3)
        axes.plot(x, ours.needed_gflops, marker, markersize=5, color=colour, mec="white", mew=0.4, zorder=4)
    axes.set_xlabel("FLOP per byte (least traffic)", fontsize=8.5, color=INK)
    axes.set_ylabel("GFLOP/s", fontsize=8.5, color=INK)
    axes.tick_params(labelsize=7.5, colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.5)
    key = {"linestyle": "", "markersize": 5, "color": INK}
    groups, dtypes = {ours.group for ours, _ in points}, {ours.dtype for ours, _ in points}
    handles = [Line2D([], [], marker=marker, label=name, **key) for name, marker in MARKERS.items() if name in groups]
    handles += [Line2D([], [], linewidth=4, color=c, label=name) for name, c in DTYPES.items() if name in dtypes]
    handles.append(Line2D([], [], marker="o", fillstyle="none", label="eager", **{**key, "markersize": 3.5}))
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=len(handles), loc="lower left")
    return figure
