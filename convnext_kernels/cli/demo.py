"""``convnext-kernels demo``: a whole model on photographs, or Vocos on a sound, eager and accelerated."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from click.core import ParameterSource

from convnext_kernels import environment
from convnext_kernels.bench.charts import bars
from convnext_kernels.bench.numerics import RULE, TOP5_RULE
from convnext_kernels.bench.tables import Section, Table, date, machine, speedup, write_page
from convnext_kernels.bench.timing import WARMUP
from convnext_kernels.cli import demo_runs, options, sound
from convnext_kernels.cli.demo_runs import MEMORY, NAMES, Result, Subject
from convnext_kernels.interop import acceleration_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(results: list[Result], title: str) -> Table:
    """The figures: a column for each dtype."""

    def row(what: str, cell: Callable[[Result], str]) -> tuple[str, ...]:
        return (what, *map(cell, results))

    def both(what: str, cell: Callable[[Result, str], str]) -> list[tuple[str, ...]]:
        return [row(f"{name}, {what}", lambda r, name=name: cell(r, name)) for name in NAMES]

    rows = [
        *both("ms: median (minimum)", lambda r, name: f"{r.times[name].median:.2f} ({r.times[name].minimum:.2f})"),
        row("speed-up over eager (medians)", lambda r: speedup(r.speedup)),
        *both("peak MiB: 1st / 2nd pass", lambda r, name: " / ".join(f"{b / 2**20:.1f}" for b in r.peak[name]) or "-"),
        *both("largest error", lambda r, name: f"{r.errors[name]:.2e}"),
        row("allowed error", lambda r: f"{r.allowed:.2e}"),
    ]
    if results[0].top5:
        top5 = "photographs with the same top 5"
        rows.append(row(top5, lambda r: f"{r.count('same')} of {len(r.top5)}, {r.count('tie')} tied"))
    return Table(title, ("", *(result.dtype for result in results)), rows)


def verdict(results: list[Result], replaced: int, failures: list[str]) -> list[str]:
    """The speed-up, and whether the errors are within the tolerance."""
    speeds = ", ".join(f"{speedup(r.speedup, 'eager')} in {r.dtype}" for r in results)
    errors = "not within the tolerance"
    if not failures:
        share = max(r.errors["accelerated"] / r.allowed for r in results)
        errors = f"within the tolerance, {share:.0%} of the allowed error"
        errors += "; the top 5 classes agree" if results[0].top5 else ""
    return [f"Speed: {speeds}; {replaced} modules replaced.", f"Errors: {errors}."]


def _notes(subject: Subject, named: bool, batch: int, repeats: int) -> list[str]:
    """How the figures were measured, a few sentences per topic."""
    loaded = subject.loaded
    times = (
        f"Times: median (minimum) of {repeats} forward passes at batch {batch}, after {WARMUP} or more for warm-up. "
        "Eager and accelerated alternate in one process, images in channels_last. On a CPU freed memory stays in the "
        "process (glibc), so that page faults of large temporaries are not counted: these would slow eager down most."
    )
    about = loaded.about if named or loaded.classes is None else ""
    weights = f"Weights: {loaded.weights}.{about}"
    return [weights, subject.about, times, MEMORY, RULE, *([TOP5_RULE] if subject.photos else [])]


def _top5(subject: Subject, results: list[Result], named: bool) -> Table:
    """Thumbnails, and for each dtype the top 5 classes of both models."""
    from markupsafe import Markup

    names = subject.loaded.classes

    def best(found: list[tuple[int, float]]) -> str:
        return "\n".join(f"{names[i] if named else f'class {i}'} {chance:.1%}" for i, chance in found)

    image = Markup('{}\n<img src="{}" alt="{}" width="120">')
    rows = []
    for photo, *found in zip(subject.photos, *(r.top5 for r in results), strict=False):
        cells = (cell for top5 in found for cell in (best(top5.eager), best(top5.accelerated), top5.verdict))
        rows.append((image.format(photo.name, photo.thumbnail, photo.name), *cells))
    heads = (name for r in results for name in (f"eager, {r.dtype}", f"accelerated, {r.dtype}", "the same?"))
    return Table("", ("photograph", *heads), rows)


def _spectrograms(subject: Subject, results: list[Result]) -> "list[tuple[str, Figure]]":
    """Spectrograms of the given sound and, for each dtype, of what both models make of it."""
    given = sound.spectrogram(subject.sound)
    pictures = [("given", sound.picture(given, given.max().item()))]
    for result in results:
        sounds = {name: result.outputs[name][0].float().cpu() for name in NAMES}
        made = {name: sound.spectrogram(samples) for name, samples in sounds.items()}
        high = max(decibels.max().item() for decibels in made.values())
        pictures += [(f"{name}, {result.dtype}", sound.picture(s, high)) for name, s in made.items()]
        difference = sound.spectrogram(sounds["accelerated"] - sounds["eager"])
        pictures.append((f"difference of the two, {result.dtype}", sound.picture(difference, high)))
    return pictures


def _sections(subject: Subject, results: list[Result], named: bool) -> list[Section]:
    """Charts, and the photographs or spectrograms."""
    dtypes = [result.dtype for result in results]

    def drawn(title: str, value: Callable[[Result, str], float], **form: object) -> "Figure":
        return bars(title, dtypes, {name: [value(result, name) for result in results] for name in NAMES}, **form)

    figures = [
        ("Time", drawn("Milliseconds per forward pass, median", lambda r, name: r.times[name].median)),
        ("Memory", drawn("Peak memory of the first pass, MiB", lambda r, name: [*r.peak[name], 0][0] / 2**20)),
        (
            "Error",
            drawn("Error, % of the allowed error", lambda r, name: 100 * r.errors[name] / r.allowed, limit=100),
        ),
    ]
    if subject.sound is not None:
        inputs = Section("Spectrograms", [_spectrograms(subject, results)])
    else:
        inputs = Section("Photographs and their top 5 classes", [_top5(subject, results, named)])
    return [Section("Charts", [figures]), inputs]


@click.command("demo")
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=options.FILE)
@options.model
@click.option("--weights", type=options.FILE, metavar="FILE", help="State dict, .pth or .safetensors.")
@click.option("--pretrained", is_flag=True, help="Download the weights.")
@options.count("--batch", None, "Inputs per pass. [default: all that are given]")
@options.count("--size", 224, "Image height and width.", least=32)
@options.count("--repeats", 20, "Timed forward passes.")
@options.dtypes
@options.threads
@options.backend
@options.device("cpu")
@options.report(Path("convnext-kernels-report/demo.html"), "HTML report.")
def command(
    paths: tuple[Path, ...],
    model_name: str,
    weights: Path | None,
    pretrained: bool,
    batch: int | None,
    size: int,
    repeats: int,
    dtypes: tuple[str, ...],
    backend: str,
    device: str,
    report: Path | None,
) -> None:
    """Compare a model, eager and accelerated, on photographs, or Vocos on a sound.

    Fails if the results differ by more than rounding. PATH: images, folders of images (default: 8 photographs), or WAV.
    """
    if weights is not None and pretrained:
        raise click.UsageError("--weights and --pretrained cannot be used together")
    if model_name == "vocos":
        if click.get_current_context().get_parameter_source("size") is not ParameterSource.DEFAULT:
            raise click.UsageError("--size is for photographs; --model vocos takes a WAV file as PATH")
        subject = demo_runs.vocoder(paths, weights, pretrained)
    else:
        subject = demo_runs.photographs(paths, size, model_name, weights, pretrained)
    loaded, batch, dtypes = subject.loaded, batch or len(subject.x), tuple(dict.fromkeys(dtypes))
    if not acceleration_report(loaded.model).rows:
        raise click.ClickException(f"--model {loaded.name}: it has no ConvNeXt block, nothing to accelerate")
    acceleration = acceleration_report(subject.build("accelerated", torch.float32, device, backend))
    if not acceleration.replaced:
        reasons = "; ".join(dict.fromkeys(row.reason for row in acceleration.rows))
        raise click.ClickException(f"--model {loaded.name}: no module could be replaced: {reasons}")
    with options.progress_bar("demo", None) as advance:
        results = [
            subject.measure(dtype, batch, repeats, device, backend, lambda step, d=dtype: advance(f"{d} {step}", 1))
            for dtype in dtypes
        ]
    named = results[0].outputs["eager"].shape[1] == len(loaded.classes or ())
    title = f"{loaded.name}, batch {batch}, {subject.shape}, {device}, weights: {loaded.weights}"
    notes = _notes(subject, named, batch, repeats)
    failures = [line for result in results for line in result.failures([photo.name for photo in subject.photos])]
    figures, said = table(results, title), verdict(results, acceleration.replaced, failures)
    options.show(figures)
    click.echo("\n".join(said))
    if report is not None:
        sections = [
            Section("Figures", [figures, *said]),
            *_sections(subject, results, named),
            Section("How it was measured", notes),
            Section("What was replaced", [str(acceleration)]),
            Section("Machine", machine(environment.collect())),
        ]
        write_page(report, "Eager and accelerated", f"{title}. {date()}", sections, failures=failures)
        click.echo(f"Report: {report}")
    if failures:
        raise click.ClickException("; ".join(failures))
