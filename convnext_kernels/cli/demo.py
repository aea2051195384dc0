"""``convnext-kernels demo``: a whole model on photographs, or Vocos on a sound, eager and accelerated."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from convnext_kernels.bench.charts import speedup
from convnext_kernels.cli import options
from convnext_kernels.cli.demo_report import Result, write_demo
from convnext_kernels.cli.demo_runs import Run, SoundRun

if TYPE_CHECKING:
    from torch import Tensor

    from convnext_kernels.cli.load import Loaded
    from convnext_kernels.cli.photos import Photo


def table_rows(results: list[Result], run: Run) -> list[tuple[str, list[str]]]:
    """Rows (what, one value for each dtype) for the terminal and the report."""

    def line(what: str, value: object) -> tuple[str, list[str]]:
        return what, [value(result) for result in results]

    def top5(result: Result) -> str:
        same, ties, all_of = result.count("same"), result.count("tie"), len(result.top5)
        return f"{same} of {all_of}" + (f", {ties} tied" if ties else "")

    def timing(name: str) -> tuple[str, list[str]]:
        value = "{0.median:.2f} ({0.minimum:.2f})"
        return line(f"{name}, ms: median (minimum)", lambda r: value.format(r.times[name]))

    def peak(name: str) -> tuple[str, list[str]]:
        return line(
            f"{name}, peak MiB: 1st / 2nd pass", lambda r: " / ".join(f"{size / 2**20:.1f}" for size in r.peak[name])
        )

    return [
        timing("eager"),
        timing("accelerated"),
        line("speed-up over eager (medians)", lambda r: speedup(r.speedup)),
        peak("eager"),
        peak("accelerated"),
        line(f"largest difference of the {run.output}", lambda r: f"{r.comparison.difference:.2e}"),
        line(f"the same, over the largest of the {run.output}", lambda r: f"{r.comparison.relative:.2e}"),
        line("eager, largest error", lambda r: f"{r.comparison.eager_error:.2e}"),
        line("accelerated, largest error", lambda r: f"{r.comparison.accelerated_error:.2e}"),
        line("allowed error", lambda r: f"{r.comparison.allowed:.2e}"),
        *([line("photographs with the same top 5", top5)] if run.output == "logits" else []),
    ]


def _print(results: list[Result], run: Run, title: str, replaced: int, failures: list[str]) -> None:
    """Print the table, then the speed-up and whether the errors are within the tolerance."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("", title=Text(title), box=box.SIMPLE, pad_edge=False)
    for result in results:
        table.add_column(result.dtype, justify="right")
    for what, values in table_rows(results, run):
        table.add_row(what, *values)
    options.console().print(table)
    speeds = ", ".join(f"{speedup(r.speedup, 'eager')} in {r.dtype}" for r in results)
    click.echo(f"Speed: {speeds}; {replaced} modules replaced.")
    if failures:
        click.echo("Errors: not within the tolerance.")
    else:
        share = max(r.comparison.accelerated_error / r.comparison.allowed for r in results)
        classes = "; the top 5 classes agree" if run.output == "logits" else ""
        click.echo(f"Errors: within the tolerance, {share:.0%} of the allowed error{classes}.")


def _values(results: list[Result]) -> list[dict[str, object]]:
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
    kind: type[Run]
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

    from convnext_kernels.cli import load, photos

    chosen = photos.read(paths, size) if paths else photos.shipped(size)
    loaded = load.load(model_name, weights, pretrained)
    x = photos.normalise(torch.stack([photo.pixels for photo in chosen]), *loaded.mean_std)
    about = f"Images: {len(x)}, each cropped to a square at the centre and resized to {size}x{size}."
    facts = {"size": size, "photographs": [photo.name for photo in chosen]}
    return _Subject(loaded, Run, x, f"{size}x{size}", about, facts, photos=chosen)


def _sound(paths: tuple[Path, ...], weights: Path | None, pretrained: bool) -> _Subject:
    from convnext_kernels.cli import sound

    if len(paths) > 1:
        raise click.UsageError(f"--model vocos: expected one WAV file, got {len(paths)}")
    file = paths[0] if paths else sound.shipped()
    samples = sound.read(file)
    loaded = sound.load(weights, pretrained)
    mel = sound.mel(loaded.model, samples)
    about = f"Sound: {sound.SECONDS} seconds of {file.name}, as a mel spectrogram of {mel.shape[-1]} frames."
    loaded = replace(loaded, model=sound.Vocoder(loaded.model))
    shape, facts = f"{sound.SECONDS} s of sound", {"seconds": sound.SECONDS, "sound": str(file)}
    return _Subject(loaded, SoundRun, mel, shape, about, facts, sound=samples[0])


def _notes(subject: _Subject, named: bool, run: Run) -> list[str]:
    """How the figures were measured, a few sentences per topic."""
    from convnext_kernels.bench.numerics import RULE, TOP5_RULE
    from convnext_kernels.bench.timing import WARMUP, glibc
    from convnext_kernels.cli import memory

    loaded, images = subject.loaded, run.output == "logits"
    what = f"{run.batch} {'image' if images else 'sound'}{'s' if run.batch > 1 else ''}"
    layout = ", both in channels_last" if images else ""
    times = (
        f"Times: median (minimum) of {run.repeats} forward passes of {what} each, "
        f"after at least {WARMUP} warm-up passes. Eager and accelerated alternate in one process{layout}."
    )
    if run.device == "cpu" and glibc() is not None:
        times += (
            " Freed memory stays in the process, so that page faults of large temporaries are not counted: these would"
            " slow eager down most."
        )
    return [
        f"Weights: {loaded.weights}.{loaded.about if named or loaded.classes is None else ''}",
        subject.about,
        times,
        memory.METHOD[run.device],
        RULE,
        *([TOP5_RULE] if images else []),
    ]


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
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Per pass: 8 images or 1 sound.")
@click.option("--size", type=click.IntRange(min=32), metavar="N", default=224, help="Image height and width.")
@click.option("--repeats", type=click.IntRange(min=1), metavar="N", default=20, help="Timed forward passes.")
@options.dtypes
@options.threads
@options.backend
@options.device
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default=Path("convnext-kernels-report/demo.html"),
    metavar="FILE",
    help="HTML report.",
)
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
    if not no_report:
        options.need("jinja2", "the report")
        options.need("matplotlib", "the report")
        options.check_writable(report, "--report")
    options.need("psutil", "demo")
    options.check_backend(backend)
    options.check_device(device)

    from convnext_kernels.environment import collect
    from convnext_kernels.interop import acceleration_report

    if model_name == "vocos":
        given = context.get_parameter_source
        if given("size") is not ParameterSource.DEFAULT or images:
            raise click.UsageError("--size and --images are for photographs; --model vocos takes a WAV file as PATH")
        subject = _sound(paths, weights, pretrained)
    else:
        subject = _photographs(images + paths, size, model_name, weights, pretrained)
    loaded, kind, x = subject.loaded, subject.kind, subject.x
    if not acceleration_report(loaded.model).rows:
        raise click.ClickException(f"--model {loaded.name}: it has no ConvNeXt block, nothing to accelerate")
    batch = batch or (8 if kind is Run else 1)
    run = kind(loaded.model, x, batch, repeats, backend, device)
    with options.thread_count(threads):
        machine = collect()
        acceleration = acceleration_report(run.build(dtypes[0], "accelerated"))
        if not acceleration.replaced:
            reasons = "; ".join(dict.fromkeys(row.reason for row in acceleration.rows))
            raise click.ClickException(f"--model {loaded.name}: no module could be replaced: {reasons}")
        results = run.measure(tuple(dict.fromkeys(dtypes)))

    classes = loaded.classes if results[0].outputs == len(loaded.classes or ()) else None
    title = f"{loaded.name}, batch {batch}, {subject.shape}, {device}, weights: {loaded.weights}"
    notes = _notes(subject, classes is not None, run)
    failures = [failure for result in results for failure in result.failures(subject.photos)]
    if as_json:
        head = {"model": loaded.name, "weights": loaded.weights, "batch": batch, **subject.facts, "repeats": repeats}
        head |= {"device": device, "backend": backend}
        head |= {"modules": len(acceleration.rows), "replaced": acceleration.replaced}
        rest = {"results": _values(results), "failures": failures, "method": notes, "machine": machine}
        options.print_json(head | rest)
    else:
        _print(results, run, title, acceleration.replaced, failures)
    if not no_report:
        write_demo(
            report,
            title=title,
            notes=notes,
            classes=classes,
            photos=subject.photos,
            results=results,
            rows=table_rows(results, run),
            acceleration=str(acceleration),
            machine=machine,
            failures=failures,
            sound=subject.sound,
        )
        click.echo(f"Report: {report}", err=as_json)
    if failures:
        raise click.ClickException("; ".join(failures))
