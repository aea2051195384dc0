"""``convnext-kernels demo``: a whole model on photographs, or Vocos on a sound, eager and accelerated."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from convnext_kernels.bench.tables import Table, machine, speedup
from convnext_kernels.cli import options

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from convnext_kernels.bench.page import Section
    from convnext_kernels.cli.demo_runs import Result, Run
    from convnext_kernels.cli.load import Loaded
    from convnext_kernels.cli.photos import Photo


def table(results: "list[Result]", title: str) -> Table:
    """The figures: a column for each dtype."""

    def peak(result: "Result", name: str) -> str:
        return " / ".join(f"{size / 2**20:.1f}" for size in result.peak[name])

    def top5(result: "Result") -> str:
        ties = result.count("tie")
        return f"{result.count('same')} of {len(result.top5)}" + (f", {ties} tied" if ties else "")

    values = {
        f"{name}, ms: median (minimum)": lambda r, n=name: f"{r.times[n].median:.2f} ({r.times[n].minimum:.2f})"
        for name in ("eager", "accelerated")
    }
    values |= {"speed-up over eager (medians)": lambda r: speedup(r.speedup)}
    values |= {f"{name}, peak MiB: 1st / 2nd pass": lambda r, n=name: peak(r, n) for name in ("eager", "accelerated")}
    values |= {
        "largest difference of the two": lambda r: f"{r.comparison.difference:.2e}",
        "the same, over the largest output": lambda r: f"{r.comparison.relative:.2e}",
        "eager, largest error": lambda r: f"{r.comparison.eager_error:.2e}",
        "accelerated, largest error": lambda r: f"{r.comparison.accelerated_error:.2e}",
        "allowed error": lambda r: f"{r.comparison.allowed:.2e}",
    }
    if results[0].top5:
        values |= {"photographs with the same top 5": top5}
    rows = [(what, *(value(result) for result in results)) for what, value in values.items()]
    return Table(title, ("", *(result.dtype for result in results)), rows)


def verdict(results: "list[Result]", replaced: int, failures: list[str]) -> list[str]:
    """The speed-up, and whether the errors are within the tolerance."""
    speeds = ", ".join(f"{speedup(r.speedup, 'eager')} in {r.dtype}" for r in results)
    share = max(r.comparison.accelerated_error / r.comparison.allowed for r in results)
    errors = f"within the tolerance, {share:.0%} of the allowed error" + "; the top 5 classes agree" * bool(
        results[0].top5
    )
    errors = "not within the tolerance" if failures else errors
    return [f"Speed: {speeds}; {replaced} modules replaced.", f"Errors: {errors}."]


def _values(results: "list[Result]") -> list[dict[str, object]]:
    """The results for --json."""
    return [
        {
            "dtype": r.dtype,
            "times_ms": {name: {"median": t.median, "minimum": t.minimum} for name, t in r.times.items()},
            "times_faster_than_eager": r.speedup,
            "peak_bytes": {name: {"first": first, "second": second} for name, (first, second) in r.peak.items()},
            "errors": r.comparison,
            "top5": {verdict: r.count(verdict) for verdict in ("same", "tie", "different")},
        }
        for r in results
    ]


@dataclass
class _Subject:
    """A model and what it is run on."""

    loaded: "Loaded"
    kind: "type[Run]"
    x: "Tensor"  # all inputs
    shape: str  # of an input, for the title
    about: str  # where the inputs come from, for the notes
    facts: dict[str, object]  # the same for --json
    photos: "list[Photo]" = field(default_factory=list)
    sound: "Tensor | None" = None  # (samples,)


def _photographs(
    paths: tuple[Path, ...], size: int, model_name: str, weights: Path | None, pretrained: bool
) -> _Subject:
    import torch

    from convnext_kernels.cli import demo_runs, load, photos

    chosen = photos.read(paths, size) if paths else photos.shipped(size)
    loaded = load.load(model_name, weights, pretrained)
    x = photos.normalise(torch.stack([photo.pixels for photo in chosen]), *loaded.mean_std)
    about = f"Images: {len(x)}, each cropped to a square at the centre and resized to {size}x{size}."
    facts = {"size": size, "photographs": [photo.name for photo in chosen]}
    return _Subject(loaded, demo_runs.Run, x, f"{size}x{size}", about, facts, photos=chosen)


def _sound(paths: tuple[Path, ...], weights: Path | None, pretrained: bool) -> _Subject:
    from convnext_kernels.cli import demo_runs, sound

    if len(paths) > 1:
        raise click.UsageError(f"--model vocos: expected one WAV file, got {len(paths)}")
    file = paths[0] if paths else sound.shipped()
    samples = sound.read(file)
    loaded = sound.load(weights, pretrained)
    mel = sound.mel(loaded.model, samples)
    about = f"Sound: {sound.SECONDS} seconds of {file.name}, as a mel spectrogram of {mel.shape[-1]} frames."
    loaded = replace(loaded, model=sound.Vocoder(loaded.model))
    shape, facts = f"{sound.SECONDS} s of sound", {"seconds": sound.SECONDS, "sound": str(file)}
    return _Subject(loaded, demo_runs.SoundRun, mel, shape, about, facts, sound=samples[0])


def _notes(subject: _Subject, named: bool, run: "Run") -> list[str]:
    """How the figures were measured, a few sentences per topic."""
    from convnext_kernels.bench.numerics import RULE, TOP5_RULE
    from convnext_kernels.bench.timing import WARMUP, glibc
    from convnext_kernels.cli import memory

    loaded, images = subject.loaded, bool(subject.photos)
    times = (
        f"Times: median (minimum) of {run.repeats} forward passes at batch {run.batch}, after at least {WARMUP} "
        f"warm-up passes. Eager and accelerated alternate in one process{', both in channels_last' if images else ''}."
    )
    if run.device == "cpu" and glibc() is not None:
        times += (
            " Freed memory stays in the process, so that page faults of large temporaries are not counted: these would"
            " slow eager down most."
        )
    weights = f"Weights: {loaded.weights}.{loaded.about if named or loaded.classes is None else ''}"
    return [weights, subject.about, times, memory.METHOD[run.device], RULE, *([TOP5_RULE] if images else [])]


def _top5(results: "list[Result]", photos: "list[Photo]", classes: Sequence[str] | None) -> Table:
    """Thumbnails, and for each dtype the top 5 classes of both models."""
    from markupsafe import Markup

    def best(found: list[tuple[int, float]]) -> str:
        return "\n".join(f"{classes[i] if classes else f'class {i}'} {chance:.1%}" for i, chance in found)

    image = Markup('{}\n<img src="{}" alt="{}" width="120">')
    rows = []
    for k, photo in enumerate(photos):
        row = [image.format(photo.name, photo.thumbnail, photo.name)]
        for result in results:
            found = result.top5[k]
            row += [best(found.eager), best(found.accelerated), found.verdict]
        rows.append(tuple(row))
    heads = (name for r in results for name in (f"eager, {r.dtype}", f"accelerated, {r.dtype}", "the same?"))
    return Table("", ("photograph", *heads), rows)


def _spectrograms(subject: _Subject, results: "list[Result]") -> "list[tuple[str, Figure]]":
    """Spectrograms of the given sound and, for each dtype, of what both models make of it."""
    from convnext_kernels.cli import sound

    given = sound.spectrogram(subject.sound)
    pictures = [("given", sound.picture(given, given.max().item()))]
    for result in results:
        made = {name: sound.spectrogram(samples) for name, samples in result.sounds.items()}
        high = max(decibels.max().item() for decibels in made.values())
        pictures += [(f"{name}, {result.dtype}", sound.picture(s, high)) for name, s in made.items()]
        difference = sound.spectrogram(result.sounds["accelerated"] - result.sounds["eager"])
        pictures.append((f"difference of the two, {result.dtype}", sound.picture(difference, high)))
    return pictures


def _sections(subject: _Subject, results: "list[Result]", classes: Sequence[str] | None) -> "list[Section]":
    """Charts, and the photographs or spectrograms."""
    from convnext_kernels.bench.charts import bars
    from convnext_kernels.bench.page import Section

    dtypes, names = [result.dtype for result in results], ("eager", "accelerated")
    times = {name: [result.times[name].median for result in results] for name in names}
    memory = {name: [result.peak[name][0] / 2**20 for result in results] for name in names}
    errors = {
        name: [100 * getattr(r.comparison, f"{name}_error") / r.comparison.allowed for r in results] for name in names
    }
    figures = [
        ("Time", bars("Milliseconds per forward pass, median", dtypes, times)),
        ("Memory", bars("Peak memory of the first forward pass, MiB", dtypes, memory)),
        ("Error", bars("Error against fp64, % of the allowed error", dtypes, errors, limit=100)),
    ]
    if subject.sound is not None:
        inputs = Section("Spectrograms", [_spectrograms(subject, results)])
    else:
        inputs = Section("Photographs and their top 5 classes", [_top5(results, subject.photos, classes)])
    return [Section("Charts", [figures]), inputs]


@click.command("demo")
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=click.Path(path_type=Path))
@options.model
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="State dict, .pth or .safetensors.")
@click.option("--pretrained", is_flag=True, help="Download the weights.")
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Image or folder; else 8 photographs are used.",
)
@options.count("--batch", None, "Per pass: 8 images or 1 sound.")
@options.count("--size", 224, "Image height and width.", least=32)
@options.count("--repeats", 20, "Timed forward passes.")
@options.dtypes
@options.threads
@options.backend
@options.device
@options.report(Path("convnext-kernels-report/demo.html"), "HTML report.", "FILE")
@click.option("--no-report", is_flag=True, help="Write no report.")
@options.as_json
@click.pass_context
def command(
    context: click.Context,
    paths: tuple[Path, ...],
    model_name: str,
    weights: Path | None,
    pretrained: bool,
    images: tuple[Path, ...],
    batch: int | None,
    size: int,
    repeats: int,
    dtypes: tuple[str, ...],
    threads: int | None,
    backend: str,
    device: str,
    report: Path,
    no_report: bool,
    as_json: bool,
) -> None:
    """Compare a model, eager and accelerated, on photographs, or Vocos on a sound.

    Fails if the results differ by more than rounding. PATH: as --images, or WAV.
    """
    if weights is not None and pretrained:
        raise click.UsageError("--weights and --pretrained cannot be used together")
    options.check_report(None if no_report else report)
    options.need("psutil", "demo")
    options.check_backend(backend)
    options.check_device(device)
    from convnext_kernels.environment import collect
    from convnext_kernels.interop import acceleration_report

    if model_name == "vocos":
        if context.get_parameter_source("size") is not ParameterSource.DEFAULT or images:
            raise click.UsageError("--size and --images are for photographs; --model vocos takes a WAV file as PATH")
        subject = _sound(paths, weights, pretrained)
    else:
        subject = _photographs(images + paths, size, model_name, weights, pretrained)
    loaded = subject.loaded
    if not acceleration_report(loaded.model).rows:
        raise click.ClickException(f"--model {loaded.name}: it has no ConvNeXt block, nothing to accelerate")
    run = subject.kind(loaded.model, subject.x, batch or (8 if subject.photos else 1), repeats, backend, device)
    with options.thread_count(threads):
        environment = collect()
        acceleration = acceleration_report(run.build(dtypes[0], "accelerated"))
        if not acceleration.replaced:
            reasons = "; ".join(dict.fromkeys(row.reason for row in acceleration.rows))
            raise click.ClickException(f"--model {loaded.name}: no module could be replaced: {reasons}")
        results = run.measure(tuple(dict.fromkeys(dtypes)))
    classes = loaded.classes if results[0].outputs == len(loaded.classes or ()) else None
    title = f"{loaded.name}, batch {run.batch}, {subject.shape}, {device}, weights: {loaded.weights}"
    notes = _notes(subject, classes is not None, run)
    failures = [line for result in results for line in result.failures([photo.name for photo in subject.photos])]
    figures, said = table(results, title), verdict(results, acceleration.replaced, failures)
    if as_json:
        head = {"model": loaded.name, "weights": loaded.weights, "batch": run.batch, **subject.facts}
        head |= {"repeats": repeats, "device": device, "backend": backend}
        head |= {"modules": len(acceleration.rows), "replaced": acceleration.replaced}
        rest = {"results": _values(results), "failures": failures, "method": notes, "machine": environment}
        options.print_json(head | rest)
    else:
        options.show(figures)
        click.echo("\n".join(said))
    if not no_report:
        from convnext_kernels.bench import page

        sections = [
            page.Section("Figures", [figures, *said]),
            *_sections(subject, results, classes),
            page.Section("How it was measured", notes),
            page.Section("What was replaced", [str(acceleration)]),
            page.Section("Machine", machine(environment)),
        ]
        page.write(report, "Eager and accelerated", f"{title}. {page.date()}", sections, failures=failures)
        click.echo(f"Report: {report}", err=as_json)
    if failures:
        raise click.ClickException("; ".join(failures))
