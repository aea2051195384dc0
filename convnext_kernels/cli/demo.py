"""``convnext-kernels demo``: a whole model on photographs, eager and accelerated."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from convnext_kernels import environment
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.bench.measure import peak_growth
from convnext_kernels.bench.numerics import RULE, allowed, judge
from convnext_kernels.bench.tables import Table, date, machine, speedup, write_page
from convnext_kernels.bench.timing import WARMUP, Times, interleave, steady_allocator
from convnext_kernels.cli import load, options, photos
from convnext_kernels.interop import accelerate

NAMES = ("eager", "accelerated")
REPORT = "convnext-kernels-report/demo.html"
NOTES = (
    f"Times: median (minimum) of the forward passes, after {WARMUP} or more for warm-up. "
    "Eager and accelerated alternate in one process, images in channels_last. On a CPU freed memory stays in the "
    "process (glibc), so that page faults of large temporaries are not counted: these would slow eager down most.",
    "Peak memory: growth of the process's resident set (Linux) or of what PyTorch's CUDA allocator holds, during a "
    "forward pass after the first one, in which a backend packs the weights that it keeps; medians of three.",
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
    peak: dict[str, int | None]  # bytes; None where they cannot be measured
    logits: dict[str, Tensor]

    @property
    def speedup(self) -> float:
        """Median time of eager over the median time of accelerated."""
        return self.times["eager"].median / self.times["accelerated"].median

    @property
    def same_top5(self) -> int:
        """Of how many photographs both models have the same five classes, in the same order."""
        eager, ours = (self.logits[name].argsort(-1, descending=True)[:, :5] for name in NAMES)
        return (eager == ours).all(-1).sum().item()


def build(model: nn.Module, name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A copy of the model, "eager" or "accelerated"."""
    model = copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last)
    return accelerate(model) if name == "accelerated" else model


def _peak(model: nn.Module, x: Tensor, device: str) -> int | None:
    model(x)
    found = [peak_growth(partial(model, x), device) for _ in range(3)]
    return None if None in found else int(statistics.median(found))


def measure(
    model: nn.Module, x: Tensor, dtype_name: str, repeats: int, device: str, on_step: Callable[[str], None]
) -> Result:
    """Memory, errors and times in one dtype for images x (N, 3, H, W) in fp32; `on_step` is told what is done next."""
    dtype = DTYPES[dtype_name]
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    models = {name: build(model, name, dtype, device) for name in NAMES}
    with torch.inference_mode():
        on_step("memory")  # before steady_allocator, which keeps freed memory
        peak = {name: _peak(model, x, device) for name, model in models.items()}
        with steady_allocator():
            on_step("errors and times")
            # Exactly the weights and inputs of this dtype, so that only the arithmetic is compared.
            truth = copy.deepcopy(models["eager"]).to(torch.float64)(x.double())
            logits = {name: model(x) for name, model in models.items()}
            if not isinstance(truth, Tensor) or truth.ndim != 2:
                raise ValueError("--model: expected a classifier with one output tensor (images, classes)")
            calls = {name: partial(model, x) for name, model in models.items()}
            times = interleave(calls, rounds=repeats, device=device)
    errors = {name: (y.double() - truth).abs().max().item() for name, y in logits.items()}
    reason = judge({"logits": truth}, *({"logits": logits[name]} for name in NAMES), dtype).reason
    most = allowed(errors["eager"], truth.abs().max().item(), dtype)
    return Result(dtype_name, errors, most, reason, times, peak, logits)


def table(results: list[Result], title: str) -> Table:
    """The figures: a column for each dtype."""

    def row(what: str, cell: Callable[[Result], str]) -> tuple[str, ...]:
        return (what, *map(cell, results))

    def both(what: str, cell: Callable[[Result, str], str]) -> list[tuple[str, ...]]:
        return [row(f"{name}, {what}", lambda r, name=name: cell(r, name)) for name in NAMES]

    rows = [
        *both("ms: median (minimum)", lambda r, name: f"{r.times[name].median:.2f} ({r.times[name].minimum:.2f})"),
        row("speed-up over eager (medians)", lambda r: speedup(r.speedup)),
        *both("peak MiB", lambda r, name: "-" if r.peak[name] is None else f"{r.peak[name] / 2**20:.1f}"),
        *both("largest error", lambda r, name: f"{r.errors[name]:.2e}"),
        row("allowed error", lambda r: f"{r.allowed:.2e}"),
        row("photographs with the same top 5", lambda r: f"{r.same_top5} of {len(r.logits['eager'])}"),
    ]
    return Table(title, ("", *(result.dtype for result in results)), rows)


def _top5(chosen: list[photos.Photo], results: list[Result], classes: list[str] | None) -> Table:
    """Thumbnails, and for each dtype the top 5 classes of both models."""
    from markupsafe import Markup

    count = results[0].logits["eager"].shape[1]
    names = classes if len(classes or ()) == count else [f"class {i}" for i in range(count)]

    def best(logits: Tensor) -> str:
        chances, indices = logits.float().softmax(-1).topk(min(5, count))
        return "\n".join(f"{names[i]} {p:.1%}" for i, p in zip(indices.tolist(), chances.tolist(), strict=True))

    image = Markup('{0}\n<img src="{1}" alt="{0}" width="120">')
    rows = []
    for i, photo in enumerate(chosen):
        cells = (best(r.logits[name][i]) for r in results for name in NAMES)
        rows.append((image.format(photo.name, photo.thumbnail), *cells))
    return Table("", ("photograph", *(f"{name}, {r.dtype}" for r in results for name in NAMES)), rows)


@click.command("demo")
@click.argument("paths", nargs=-1, metavar="[IMAGE]...", type=options.INPUT)
@options.model
@click.option("--pretrained", is_flag=True, help="Download the weights.")
@options.count("--size", 224, "Image height and width.", least=32)
@options.count("--repeats", 20, "Timed forward passes.")
@options.dtypes
@options.threads
@options.device("cpu")
@click.option("--report", type=options.Output(), default=REPORT, help="HTML page; '' for none.")
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
    """Compare a model, eager and accelerated, on photographs: IMAGE... or eight that are shipped.

    Fails if the results differ by more than rounding.
    """
    from torchvision.transforms.functional import normalize

    if report is not None:
        import jinja2  # noqa: F401  now, not after minutes
    chosen = photos.read(paths, size) if paths else photos.shipped(size)
    loaded = load.load(model_name, pretrained)
    acceleration = load.accelerated(copy.deepcopy(loaded.model), loaded.name)
    x = normalize(torch.stack([photo.pixels for photo in chosen]) / 255, *loaded.mean_std)
    with options.progress_bar("demo", None) as advance:
        results = [
            measure(loaded.model, x, dtype, repeats, device, lambda step, dtype=dtype: advance(f"{dtype} {step}", 1))
            for dtype in dict.fromkeys(dtypes)
        ]
    title = f"{loaded.name}, batch {len(x)}, {size}x{size}, {device}, weights: {loaded.weights}"
    failures = [f"{r.dtype}: {r.reason}" for r in results if r.reason]
    share = max(r.errors["accelerated"] / r.allowed for r in results)
    within = f"within the tolerance, {share:.0%} of the allowed error"
    speeds = ", ".join(f"{speedup(r.speedup, 'eager')} in {r.dtype}" for r in results)
    said = [
        f"Speed: {speeds}; {acceleration.replaced} modules replaced.",
        f"Errors: {'not within the tolerance' if failures else within}.",
    ]
    figures = table(results, title)
    options.show(figures)
    click.echo("\n".join(said))
    if report is not None:
        images = f"Images: {len(x)}, each cropped to a square at the centre and resized to {size}x{size}."
        sections = {
            "Figures": [figures, *said, *failures],
            "Photographs and their top 5 classes": [_top5(chosen, results, loaded.classes)],
            "How it was measured": [images, f"{repeats} forward passes were timed.", *NOTES],
            "What was replaced": [str(acceleration)],
            "Machine": machine(environment.collect()),
        }
        write_page(report, "Eager and accelerated", f"{title}. {date()}", sections)
        click.echo(f"Report: {report}")
    if failures:
        raise click.ClickException("; ".join(failures))
