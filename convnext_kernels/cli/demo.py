"""``convnext-kernels demo``: a whole model on photographs, or Vocos on a sound, eager and accelerated."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from click.core import ParameterSource
from torch import Tensor, nn

from convnext_kernels import environment
from convnext_kernels.bench.measure import peak_growth
from convnext_kernels.bench.numerics import RULE, allowed, judge
from convnext_kernels.bench.tables import Table, date, machine, speedup, write_page
from convnext_kernels.bench.timing import WARMUP, Times, interleave, steady_allocator
from convnext_kernels.cli import load, options, photos, sound
from convnext_kernels.cli.photos import Photo
from convnext_kernels.interop import accelerate, acceleration_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
NAMES = ("eager", "accelerated")
MODELS = 3  # whose peaks are measured: single ones differ by a third, because freed blocks are reused differently
NOTES = (
    f"Times: median (minimum) of the forward passes, after {WARMUP} or more for warm-up. "
    "Eager and accelerated alternate in one process, images in channels_last. On a CPU freed memory stays in the "
    "process (glibc), so that page faults of large temporaries are not counted: these would slow eager down most.",
    "Peak memory: growth of the process's resident set (Linux) or of what PyTorch's CUDA allocator holds, during the "
    "first and the second forward pass of a new model; medians of three models. A pass of a copy loads code and "
    "libraries first. The first pass includes the weights that a backend packs and keeps, never the model's own.",
    RULE,
)


@dataclass(frozen=True)
class Result:
    """The results in one dtype."""

    dtype: str
    errors: dict[str, float]  # the largest, against fp64
    allowed: float  # for the accelerated model
    reason: str  # how `numerics.RULE` is broken; "" if it holds
    times: dict[str, Times]
    peak: dict[str, list[int]]  # bytes, in the first pass and in a later one; empty where they cannot be measured
    outputs: dict[str, Tensor]  # the logits, or the sound (1, samples)

    @property
    def speedup(self) -> float:
        """Median time of eager over the median time of accelerated."""
        return self.times["eager"].median / self.times["accelerated"].median

    @property
    def same_top5(self) -> int:
        """Of how many photographs both models have the same five classes, in the same order."""
        eager, ours = (self.outputs[name].argsort(-1, descending=True)[:, :5] for name in NAMES)
        return (eager == ours).all(-1).sum().item()


def _peaks(build: Callable[[], nn.Module], x: Tensor, device: str) -> list[int]:
    build()(x)
    found = []
    for _ in range(MODELS):
        model = build()
        found.append([peak_growth(partial(model, x), device) for _ in range(2)])
    return [] if None in found[0] else [int(statistics.median(peaks)) for peaks in zip(*found, strict=True)]


@dataclass
class Subject:
    """A model and what it is run on."""

    loaded: load.Loaded
    x: Tensor  # all inputs in fp32: photographs (N, 3, size, size), or a mel spectrogram (1, mels, frames)
    shape: str  # of an input, for the title
    about: str  # where the inputs come from, for the notes
    photos: list[Photo] = field(default_factory=list)
    sound: Tensor | None = None  # (samples,)

    def build(self, name: str, dtype: torch.dtype, device: str) -> nn.Module:
        """A copy of the model, "eager" or "accelerated"."""
        model = copy.deepcopy(self.loaded.model)
        if self.sound is None:
            model = model.to(device, dtype, memory_format=torch.channels_last)
        else:  # the head stays in fp32, because PyTorch has no Fourier transform of bf16
            model.backbone.to(dtype)
            model.to(device)
        return accelerate(model) if name == "accelerated" else model

    def measure(self, dtype_name: str, repeats: int, device: str, on_step: Callable[[str], None]) -> Result:
        """Memory, errors and times in one dtype; `on_step` is told what is done next."""
        dtype, what = getattr(torch, options.DTYPES[dtype_name]), "logits" if self.photos else "samples"
        x = self.x.to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if self.photos else x
        build, peak = partial(self.build, dtype=dtype, device=device), {}
        with torch.inference_mode():
            for name in NAMES:  # before steady_allocator, which keeps freed memory
                on_step(f"memory, {name}")
                peak[name] = _peaks(partial(build, name), x, device)
            with steady_allocator():
                on_step("errors and times")
                models = {name: build(name) for name in NAMES}
                # Exactly the weights and inputs of this dtype, so that only the arithmetic is compared.
                truth = copy.deepcopy(models["eager"]).to(torch.float64)(x.double())
                outputs = {name: model(x) for name, model in models.items()}
                if not isinstance(truth, Tensor) or truth.ndim != 2:
                    raise ValueError("--model: expected a classifier with one output tensor (images, classes)")
                calls = {name: partial(model, x) for name, model in models.items()}
                times = interleave(calls, rounds=repeats, device=device)
        eager, ours = (outputs[name] for name in NAMES)
        errors = {name: (y.double() - truth).abs().max().item() for name, y in outputs.items()}
        judgement = judge({what: truth}, {what: eager}, {what: ours}, eager.dtype)
        most = allowed(errors["eager"], truth.abs().max().item(), eager.dtype)
        return Result(dtype_name, errors, most, judgement.reason, times, peak, outputs)


def photographs(paths: tuple[Path, ...], size: int, model_name: str, pretrained: bool) -> Subject:
    """A classifier on photographs: those in `paths`, or those that are shipped."""
    from torchvision.transforms.functional import normalize

    chosen = photos.read(paths, size) if paths else photos.shipped(size)
    loaded = load.load(model_name, pretrained)
    x = normalize(torch.stack([photo.pixels for photo in chosen]) / 255, *loaded.mean_std)
    about = f"Images: {len(x)}, each cropped to a square at the centre and resized to {size}x{size}."
    return Subject(loaded, x, f"{size}x{size}", about, photos=chosen)


def vocoder(paths: tuple[Path, ...], pretrained: bool) -> Subject:
    """Vocos on the sound in `paths`, or the one that is shipped."""
    if len(paths) > 1:
        raise click.UsageError(f"--model vocos: expected one WAV file, got {len(paths)}")
    file = paths[0] if paths else sound.shipped()
    samples = sound.read(file)
    loaded = sound.load(pretrained)
    with torch.no_grad():
        mel = loaded.model.feature_extractor(samples)
    about = f"Sound: {sound.SECONDS} seconds of {file.name}, as a mel spectrogram of {mel.shape[-1]} frames."
    loaded = replace(loaded, model=sound.Vocoder(loaded.model))
    return Subject(loaded, mel, f"{sound.SECONDS} s of sound", about, sound=samples[0])


def table(results: list[Result], title: str, photos: bool) -> Table:
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
    if photos:
        rows.append(row("photographs with the same top 5", lambda r: f"{r.same_top5} of {len(r.outputs['eager'])}"))
    return Table(title, ("", *(result.dtype for result in results)), rows)


def _top5(subject: Subject, results: list[Result], names: list[str]) -> Table:
    """Thumbnails, and for each dtype the top 5 classes of both models."""
    from markupsafe import Markup

    def best(logits: Tensor) -> str:
        chances, classes = logits.float().softmax(-1).topk(min(5, len(names)))
        return "\n".join(f"{names[i]} {p:.1%}" for i, p in zip(classes.tolist(), chances.tolist(), strict=True))

    image = Markup('{0}\n<img src="{1}" alt="{0}" width="120">')
    rows = []
    for i, photo in enumerate(subject.photos):
        cells = (best(r.outputs[name][i]) for r in results for name in NAMES)
        rows.append((image.format(photo.name, photo.thumbnail), *cells))
    return Table("", ("photograph", *(f"{name}, {r.dtype}" for r in results for name in NAMES)), rows)


def _spectrograms(subject: Subject, results: list[Result]) -> "list[tuple[str, Figure]]":
    """Spectrograms of the given sound and, for each dtype, of what both models make of it."""
    pictures = [("given", sound.picture(subject.sound, sound.loudest(subject.sound)))]
    for result in results:
        eager, ours = (result.outputs[name][0].float().cpu() for name in NAMES)
        high = max(map(sound.loudest, (eager, ours)))
        made = {"eager": eager, "accelerated": ours, "difference of the two": ours - eager}
        pictures += [(f"{name}, {result.dtype}", sound.picture(samples, high)) for name, samples in made.items()]
    return pictures


@click.command("demo")
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=options.FILE)
@options.model
@click.option("--pretrained", is_flag=True, help="Download the weights.")
@options.count("--size", 224, "Image height and width.", least=32)
@options.count("--repeats", 20, "Timed forward passes.")
@options.dtypes
@options.threads
@options.device("cpu")
@options.report(Path("convnext-kernels-report/demo.html"), "HTML report.")
def command(
    paths: tuple[Path, ...],
    model_name: str,
    pretrained: bool,
    size: int,
    repeats: int,
    dtypes: tuple[str, ...],
    device: str,
    report: Path | None,
) -> None:
    """Compare a model, eager and accelerated, on photographs, or Vocos on a sound.

    Fails if the results differ by more than rounding. PATH: images (default: 8 photographs), or a WAV file.
    """
    if model_name == "vocos":
        if click.get_current_context().get_parameter_source("size") is not ParameterSource.DEFAULT:
            raise click.UsageError("--size is for photographs; --model vocos takes a WAV file as PATH")
        subject = vocoder(paths, pretrained)
    else:
        subject = photographs(paths, size, model_name, pretrained)
    loaded = subject.loaded
    if not acceleration_report(loaded.model).rows:
        raise click.ClickException(f"--model {loaded.name}: it has no ConvNeXt block, nothing to accelerate")
    acceleration = acceleration_report(subject.build("accelerated", torch.float32, device))
    if not acceleration.replaced:
        reasons = "; ".join(dict.fromkeys(row.reason for row in acceleration.rows))
        raise click.ClickException(f"--model {loaded.name}: no module could be replaced: {reasons}")
    with options.progress_bar("demo", None) as advance:
        results = [
            subject.measure(dtype, repeats, device, lambda step, dtype=dtype: advance(f"{dtype} {step}", 1))
            for dtype in dict.fromkeys(dtypes)
        ]
    title = f"{loaded.name}, batch {len(subject.x)}, {subject.shape}, {device}, weights: {loaded.weights}"
    failures = [f"{r.dtype}: {r.reason}" for r in results if r.reason]
    share = max(r.errors["accelerated"] / r.allowed for r in results)
    within = f"within the tolerance, {share:.0%} of the allowed error"
    speeds = ", ".join(f"{speedup(r.speedup, 'eager')} in {r.dtype}" for r in results)
    said = [
        f"Speed: {speeds}; {acceleration.replaced} modules replaced.",
        f"Errors: {'not within the tolerance' if failures else within}.",
    ]
    figures = table(results, title, bool(subject.photos))
    options.show(figures)
    click.echo("\n".join(said))
    if report is not None:
        sections = {"Figures": [figures, *said]}
        if subject.photos:
            count = results[0].outputs["eager"].shape[1]
            known = loaded.classes if len(loaded.classes or ()) == count else [f"class {i}" for i in range(count)]
            sections["Photographs and their top 5 classes"] = [_top5(subject, results, known)]
        else:
            sections["Spectrograms"] = [_spectrograms(subject, results)]
        notes = [f"Weights: {loaded.weights}.", subject.about, f"{repeats} forward passes were timed.", *NOTES]
        sections |= {
            "How it was measured": notes,
            "What was replaced": [str(acceleration)],
            "Machine": machine(environment.collect()),
        }
        write_page(report, "Eager and accelerated", f"{title}. {date()}", sections, failures=failures)
        click.echo(f"Report: {report}")
    if failures:
        raise click.ClickException("; ".join(failures))
