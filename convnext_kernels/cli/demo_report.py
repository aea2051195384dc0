"""The results of the demo, and their HTML report, a single file."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convnext_kernels.bench.charts import COLOURS, INK, speedup, svg, templates

if TYPE_CHECKING:
    from torch import Tensor

    from convnext_kernels.bench.numerics import Comparison, Top5
    from convnext_kernels.bench.timing import Times
    from convnext_kernels.cli.photos import Photo


@dataclass(frozen=True)
class Result:
    """The results in one dtype."""

    dtype: str
    comparison: "Comparison"
    top5: "list[Top5]"  # one per photograph
    times: "dict[str, Times]"
    peak: dict[str, tuple[int, int]]  # bytes, in the first pass and in a later one
    outputs: int  # logits per image, or samples of the sound
    sounds: "dict[str, Tensor]"  # of a vocoder: the sound (samples,) that each model makes

    @property
    def speedup(self) -> float:
        """Median time of eager over the median time of accelerated."""
        return self.times["eager"].median / self.times["accelerated"].median

    def count(self, verdict: str) -> int:
        """Number of photographs whose top 5 classes have this verdict."""
        return sum(top5.verdict == verdict for top5 in self.top5)

    def failures(self, photos: "list[Photo]") -> list[str]:
        """A line for each rule of `numerics` that is broken."""
        found = []
        if self.comparison.reason:
            found.append(f"{self.dtype}: {self.comparison.reason}")
        different = [p.name for p, top5 in zip(photos, self.top5, strict=True) if top5.verdict == "different"]
        if different:
            found.append(f"{self.dtype}: the top 5 classes differ on {', '.join(different)}")
        return found


def _bars(title: str, dtypes: list[str], values: dict[str, list[float]], style: str, limit: float | None = None) -> str:
    """Horizontal bars with their values: a group for each dtype, a colour for each name, a line at `limit`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 1.2 + 0.75 * len(dtypes)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    height = 0.36
    for offset, (name, numbers) in zip((-height / 2, height / 2), values.items(), strict=True):
        lengths = [number if math.isfinite(number) else 0 for number in numbers]
        places = [row + offset for row in range(len(dtypes))]
        bars = axes.barh(places, lengths, height * 0.92, color=COLOURS[name], label=name)
        axes.bar_label(bars, [style.format(number) for number in numbers], padding=4, fontsize=9, color=INK)
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(dtypes)), dtypes, fontsize=10)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside lower left")
    return svg(figure)


def _charts(results: list[Result]) -> list[tuple[str, str]]:
    """Return (title, svg) of each chart."""
    dtypes = [result.dtype for result in results]
    names = list(COLOURS)
    times = {name: [result.times[name].median for result in results] for name in names}
    memory = {name: [result.peak[name][0] / 2**20 for result in results] for name in names}
    errors = {
        name: [100 * getattr(result.comparison, f"{name}_error") / result.comparison.allowed for result in results]
        for name in names
    }
    return [
        ("Time", _bars("Milliseconds per forward pass, median", dtypes, times, "{:.1f}")),
        ("Memory", _bars("Peak memory of the first forward pass, MiB", dtypes, memory, "{:.0f}")),
        ("Error", _bars("Error against fp64, % of the allowed error", dtypes, errors, "{:.0f} %", limit=100)),
    ]


def _best(best: list[tuple[int, float]], classes: Sequence[str] | None) -> list[tuple[str, str]]:
    return [(classes[index] if classes else f"class {index}", f"{chance:.1%}") for index, chance in best]


def _cards(photos: "list[Photo]", results: list[Result], classes: Sequence[str] | None) -> list[dict[str, object]]:
    """For each photograph its thumbnail and, for each dtype, the top 5 classes of both models side by side."""
    return [
        {
            "photo": photo,
            "results": [
                {
                    "dtype": result.dtype,
                    "verdict": result.top5[row].verdict,
                    "rows": list(
                        zip(
                            _best(result.top5[row].eager, classes),
                            _best(result.top5[row].accelerated, classes),
                            strict=True,
                        )
                    ),
                }
                for result in results
            ],
        }
        for row, photo in enumerate(photos)
    ]


def _spectrograms(sound: "Tensor | None", results: list[Result]) -> list[tuple[str, str]]:
    """(title, svg) of the spectrograms of the given sound and, for each dtype, of what both models make of it."""
    if sound is None:
        return []
    from matplotlib.figure import Figure

    from convnext_kernels.cli.sound import RATE, spectrogram

    def draw(decibels: "Tensor", high: float) -> str:
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.subplots()
        extent = (0, len(sound) / RATE, 0, RATE / 2000)
        image = axes.imshow(
            decibels.numpy(), origin="lower", aspect="auto", extent=extent, vmin=high - 80, vmax=high, cmap="magma"
        )
        axes.set_xlabel("seconds", fontsize=8)
        axes.set_ylabel("kHz", fontsize=8)
        axes.tick_params(labelsize=8)
        figure.colorbar(image).set_label("dB", fontsize=8)
        return svg(figure)

    given = spectrogram(sound)
    pictures = [("given", draw(given, given.max().item()))]
    for result in results:
        made = {name: spectrogram(samples) for name, samples in result.sounds.items()}
        high = max(decibels.max().item() for decibels in made.values())
        pictures += [(f"{name}, {result.dtype}", draw(s, high)) for name, s in made.items()]
        difference = spectrogram(result.sounds["accelerated"] - result.sounds["eager"])
        pictures.append((f"difference of the two, {result.dtype}", draw(difference, high)))
    return pictures


def write_demo(
    file: Path,
    *,
    title: str,
    notes: list[str],
    classes: Sequence[str] | None,
    photos: "list[Photo]",
    results: list[Result],
    rows: list[tuple[str, list[str]]],
    acceleration: str,
    machine: dict[str, object],
    failures: list[str],
    sound: "Tensor | None" = None,
) -> None:
    """Write the report of ``convnext-kernels demo`` to `file`; OSError if that fails."""
    from convnext_kernels.environment import rows as machine_rows

    html = (
        templates("convnext_kernels.cli")
        .get_template("demo.html.jinja")
        .render(
            title=title,
            date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            notes=notes,
            results=results,
            speedup=speedup,
            rows=rows,
            charts=_charts(results),
            cards=_cards(photos, results, classes),
            spectrograms=_spectrograms(sound, results),
            acceleration=acceleration,
            machine=machine_rows(machine),
            backends=machine["backends"],
            failures=failures,
            colours=COLOURS,
        )
    )
    file.write_text(html, encoding="utf-8")
