"""``convnext-kernels demo``: a whole model on photographs, eager against accelerated."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.cli import options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convnext_kernels.bench.numerics import Comparison, Top5
    from convnext_kernels.bench.timing import Times
    from convnext_kernels.cli.load import Loaded
    from convnext_kernels.cli.photos import Photo

NAMES = ("eager", "accelerated")
FP64_COST = 4  # steps of the progress bar for one fp64 pass


@dataclass(frozen=True)
class Result:
    """What one dtype gave."""

    dtype: str
    comparison: "Comparison"
    top5: "list[Top5]"  # one per photograph
    times: "dict[str, Times]"
    peak: dict[str, tuple[int, int]]  # bytes, in the first pass and in a later one
    outputs: int  # logits of an image

    @property
    def speedup(self) -> float:
        """Ratio of the medians."""
        return self.times["eager"].median / self.times["accelerated"].median

    def count(self, verdict: str) -> int:
        """Number of photographs whose best five classes have this verdict."""
        return sum(top5.verdict == verdict for top5 in self.top5)

    def failures(self, photos: "list[Photo]") -> list[str]:
        """What breaks the rules of `compare`, as lines."""
        found = []
        if self.comparison.reason:
            found.append(f"{self.dtype}: {self.comparison.reason}")
        different = [p.name for p, top5 in zip(photos, self.top5, strict=True) if top5.verdict == "different"]
        if different:
            found.append(f"{self.dtype}: best five classes differ on {', '.join(different)}")
        return found


def _logits(model: "nn.Module", x: "Tensor", batch: int) -> "Tensor":
    import torch

    with torch.inference_mode():
        parts = [model(chunk) for chunk in x.split(batch)]
    if not all(isinstance(part, torch.Tensor) and part.ndim == 2 for part in parts):
        raise click.ClickException("--model: expected a classifier, whose output is one tensor (images, classes)")
    return torch.cat(parts)


@dataclass
class _Run:
    """The measurements of one call of the command."""

    model: "nn.Module"  # fp32, on the CPU, as the library built it
    x: "Tensor"  # (photographs, 3, size, size) fp32
    batch: int
    repeats: int
    backend: str
    device: str

    def build(self, dtype: str, name: str) -> "nn.Module":
        import torch

        from convnext_kernels.interop import accelerate

        model = copy.deepcopy(self.model).to(
            self.device, getattr(torch, options.DTYPES[dtype]), memory_format=torch.channels_last
        )
        return accelerate(model, backend=self.backend) if name == "accelerated" else model

    def inputs(self, dtype: str) -> "Tensor":
        import torch

        return self.x.to(self.device, getattr(torch, options.DTYPES[dtype]), memory_format=torch.channels_last)

    def timed_batch(self, dtype: str) -> "Tensor":
        """Exactly `batch` images: the photographs, from the start again where they are too few."""
        import torch

        rows = torch.arange(self.batch, device=self.device) % len(self.x)
        return self.inputs(dtype)[rows].contiguous(memory_format=torch.channels_last)

    def steps(self, dtypes: tuple[str, ...]) -> int:
        from convnext_kernels.bench.timing import WARMUP
        from convnext_kernels.cli.memory import RUNS

        chunks = -(-len(self.x) // self.batch)
        return len(dtypes) * (2 * (1 + 2 * RUNS) + (2 + FP64_COST) * chunks + 2 * (WARMUP + self.repeats))

    def measure(self, dtypes: tuple[str, ...]) -> list[Result]:
        import torch

        from convnext_kernels.bench.numerics import compare, compare_top5
        from convnext_kernels.bench.timing import interleave, steady_allocator
        from convnext_kernels.cli.memory import RUNS, peak_growth

        results = []
        chunks = -(-len(self.x) // self.batch)
        with options.progress_bar("demo", self.steps(dtypes)) as advance:
            peaks = {}
            for dtype in dtypes:  # before steady_allocator, which keeps what is freed
                x = self.timed_batch(dtype)
                for name in NAMES:
                    advance(f"{dtype} memory, {name}", 0)
                    peaks[dtype, name] = peak_growth(lambda d=dtype, n=name: self.build(d, n), x, self.device)
                    advance(f"{dtype} memory, {name}", 1 + 2 * RUNS)
            with steady_allocator():
                for dtype in dtypes:
                    models = {name: self.build(dtype, name) for name in NAMES}
                    x = self.inputs(dtype)
                    advance(f"{dtype} fp64 reference", 0)
                    # The weights and inputs of this dtype, exactly: what is compared is the arithmetic.
                    reference = _logits(copy.deepcopy(models["eager"]).to(torch.float64), x.double(), self.batch)
                    advance(f"{dtype} logits", FP64_COST * chunks)
                    logits = {name: _logits(models[name], x, self.batch) for name in NAMES}
                    advance(f"{dtype} timing", 2 * chunks)
                    x = self.timed_batch(dtype)
                    times = interleave(
                        {name: lambda m=models[name], x=x: m(x) for name in NAMES},
                        rounds=self.repeats,
                        device=self.device,
                        on_round=lambda d=dtype: advance(f"{d} timing", 2),
                    )
                    results.append(
                        Result(
                            dtype,
                            compare(reference, logits["eager"], logits["accelerated"]),
                            compare_top5(reference, logits["eager"], logits["accelerated"]),
                            times,
                            {name: peaks[dtype, name] for name in NAMES},
                            reference.shape[1],
                        )
                    )
        return results


def table_rows(results: list[Result]) -> list[tuple[str, list[str]]]:
    """Lines of (what, one value for each dtype), for the terminal and the report."""

    def line(what: str, value: object) -> tuple[str, list[str]]:
        return what, [value(result) for result in results]

    def top5(result: Result) -> str:
        same, ties, all_of = result.count("same"), result.count("tie"), len(result.top5)
        text = f"{same} of {all_of}"
        return f"{text}, {ties} tied" if ties else text

    def timing(name: str) -> tuple[str, list[str]]:
        return line(f"{name}, ms (minimum)", lambda r: f"{r.times[name].median:.2f} ({r.times[name].minimum:.2f})")

    def peak(name: str) -> tuple[str, list[str]]:
        return line(
            f"{name}, peak MiB (1st / 2nd)", lambda r: " / ".join(f"{size / 2**20:.1f}" for size in r.peak[name])
        )

    return [
        timing("eager"),
        timing("accelerated"),
        line("speed-up (medians)", lambda r: f"{r.speedup:.2f}x"),
        peak("eager"),
        peak("accelerated"),
        line("difference of the logits", lambda r: f"{r.comparison.difference:.2e}"),
        line("over the largest logit", lambda r: f"{r.comparison.relative:.2e}"),
        line("eager's largest error to fp64", lambda r: f"{r.comparison.eager_error:.2e}"),
        line("accelerated's largest error to fp64", lambda r: f"{r.comparison.accelerated_error:.2e}"),
        line("allowed error to fp64", lambda r: f"{r.comparison.allowed:.2e}"),
        line("same top 5", top5),
    ]


def _print(results: list[Result], title: str, notes: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", title=Text(title), box=box.SIMPLE, pad_edge=False)
    for result in results:
        table.add_column(result.dtype, justify="right")
    for what, values in table_rows(results):
        table.add_row(what, *values)
    console = Console()
    console.print(table, highlight=False)
    for note in notes:
        console.print(Text(note, "dim"))


def _notes(loaded: "Loaded", named: bool, run: _Run) -> list[str]:
    """What the reader must know to judge the figures."""
    from convnext_kernels.bench.numerics import RULE, TOP5_RULE
    from convnext_kernels.bench.timing import WARMUP, glibc
    from convnext_kernels.cli import memory

    times = (
        f"Times: median (minimum) of {run.repeats} forward passes of {run.batch} images each, called in turn in one "
        f"process after {WARMUP} for warm-up; channels_last for both."
    )
    if run.device == "cpu" and glibc() is not None:
        times += (
            " Freed memory stays in the process meanwhile, so that page faults of large temporaries, which hit eager"
            " hardest, are not counted."
        )
    size = run.x.shape[-1]
    return [
        f"Weights: {loaded.weights}." + (loaded.about_classes if named else ""),
        f"Images: {len(run.x)}, each cropped in the middle and resized to {size}x{size}.",
        times,
        memory.METHOD[run.device],
        RULE,
        TOP5_RULE,
    ]


@click.command("demo")
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "model_name",
    default="torchvision/convnext_tiny",
    show_default=True,
    help="A model of torchvision or timm; torchvision/ or timm/ before the name chooses.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="A state dict: .pth (tensors only) or .safetensors.")
@click.option("--pretrained", is_flag=True, help="Let the library download its own weights.")
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH...",
    help="Image files or folders.  [default: photographs that scikit-learn and scikit-image ship]",
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images a forward pass.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Side of the input.")
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Timed calls of each.")
@options.dtypes
@options.threads
@options.backend
@options.device
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default=Path("convnext-kernels-report/demo.html"),
    show_default=True,
    help="The HTML report.",
)
@click.option("--no-report", is_flag=True, help="Write no report.")
def command(
    paths: tuple[Path, ...],
    model_name: str,
    weights: Path | None,
    pretrained: bool,
    images: tuple[Path, ...],
    batch: int,
    size: int,
    repeats: int,
    dtypes: tuple[str, ...],
    threads: int | None,
    backend: str,
    device: str,
    report: Path,
    no_report: bool,
) -> None:
    """Run a model on photographs, eager and accelerated, and compare logits, top 5, time and memory.

    Prints a table and writes an HTML report. Fails where the logits or the best five classes differ by more
    than the dtype explains. PATHs are images or folders, as with --images.
    """
    if weights is not None and pretrained:
        raise click.UsageError("--weights and --pretrained exclude each other")
    if not no_report:
        options.need("jinja2", "the report")
        options.need("matplotlib", "the report")
        options.check_writable(report, "--report")
    options.need("psutil", "demo")
    options.check_backend(backend)
    options.check_device(device)

    import torch

    from convnext_kernels.cli import load, photos
    from convnext_kernels.environment import collect
    from convnext_kernels.interop import acceleration_report

    chosen = photos.read(images + paths, size) if images or paths else photos.shipped(size)
    loaded = load.load(model_name, weights, pretrained)
    if not acceleration_report(loaded.model).rows:
        raise click.ClickException(f"--model {loaded.name}: no ConvNeXt block in it, nothing to accelerate")
    x = photos.normalise(torch.stack([photo.pixels for photo in chosen]), *loaded.mean_std)
    run = _Run(loaded.model, x, batch, repeats, backend, device)
    with options.thread_count(threads):
        machine = collect()
        acceleration = acceleration_report(run.build(dtypes[0], "accelerated"))
        if not acceleration.replaced:
            reasons = "; ".join(dict.fromkeys(row.reason for row in acceleration.rows))
            raise click.ClickException(f"--model {loaded.name}: nothing could be replaced: {reasons}")
        results = run.measure(tuple(dict.fromkeys(dtypes)))

    classes = loaded.classes if results[0].outputs == len(loaded.classes or ()) else None
    title = f"{loaded.name}, batch {batch}, {size}x{size}, {device}"
    notes = _notes(loaded, classes is not None, run)
    _print(results, title, [f"Replaced: {acceleration.replaced} of {len(acceleration.rows)} modules.", *notes])
    failures = [failure for result in results for failure in result.failures(chosen)]
    if not no_report:
        from convnext_kernels.cli.report import write_demo

        write_demo(
            report,
            title=title,
            notes=notes,
            classes=classes,
            photos=chosen,
            results=results,
            rows=table_rows(results),
            acceleration=str(acceleration),
            machine=machine,
            failures=failures,
        )
        click.echo(f"Report: {report}")
    if failures:
        raise click.ClickException("; ".join(failures))
