"""``convnext-kernels demo``: a whole model on photographs, eager and accelerated."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.charts import speedup
from convnext_kernels.cli import options
from convnext_kernels.cli.demo_report import Result, write_demo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convnext_kernels.cli.load import Loaded

NAMES = ("eager", "accelerated")
FP64_COST = 4  # steps of the progress bar for one fp64 pass


def _logits(model: "nn.Module", x: "Tensor", batch: int) -> "Tensor":
    import torch

    with torch.inference_mode():
        parts = [model(chunk) for chunk in x.split(batch)]
    if not all(isinstance(part, torch.Tensor) and part.ndim == 2 for part in parts):
        raise click.ClickException("--model: expected a classifier with one output tensor (images, classes)")
    return torch.cat(parts)


@dataclass
class _Run:
    """The measurements of one run of the command."""

    model: "nn.Module"  # fp32, on the CPU, as torchvision or timm built it
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
        """Exactly `batch` images: the photographs, repeated if they are too few."""
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
            for dtype in dtypes:  # before steady_allocator, which keeps freed memory
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
                    # Exactly the weights and inputs of this dtype, so that only the arithmetic is compared.
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
        line("largest difference of the logits", lambda r: f"{r.comparison.difference:.2e}"),
        line("the same, over the largest logit", lambda r: f"{r.comparison.relative:.2e}"),
        line("eager, largest error", lambda r: f"{r.comparison.eager_error:.2e}"),
        line("accelerated, largest error", lambda r: f"{r.comparison.accelerated_error:.2e}"),
        line("allowed error", lambda r: f"{r.comparison.allowed:.2e}"),
        line("photographs with the same top 5", top5),
    ]


def _print(results: list[Result], title: str, replaced: int, failures: list[str]) -> None:
    """Print the table, then the speed-up and whether the errors are within the tolerance."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("", title=Text(title), box=box.SIMPLE, pad_edge=False)
    for result in results:
        table.add_column(result.dtype, justify="right")
    for what, values in table_rows(results):
        table.add_row(what, *values)
    options.console().print(table)
    speeds = ", ".join(f"{speedup(r.speedup, 'eager')} in {r.dtype}" for r in results)
    click.echo(f"Speed: {speeds}; {replaced} modules replaced.")
    if failures:
        click.echo("Errors: not within the tolerance.")
    else:
        share = max(r.comparison.accelerated_error / r.comparison.allowed for r in results)
        click.echo(f"Errors: within the tolerance, {share:.0%} of the allowed error; the top 5 classes agree.")


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


def _notes(loaded: "Loaded", named: bool, run: _Run) -> list[str]:
    """How the figures were measured, a few sentences per topic."""
    from convnext_kernels.bench.numerics import RULE, TOP5_RULE
    from convnext_kernels.bench.timing import WARMUP, glibc
    from convnext_kernels.cli import memory

    times = (
        f"Times: median (minimum) of {run.repeats} forward passes of {run.batch} images each, after at least {WARMUP} "
        "warm-up passes. Eager and accelerated alternate in one process, both in channels_last."
    )
    if run.device == "cpu" and glibc() is not None:
        times += (
            " Freed memory stays in the process, so that page faults of large temporaries are not counted: these would"
            " slow eager down most."
        )
    size = run.x.shape[-1]
    return [
        f"Weights: {loaded.weights}.{loaded.about if named or loaded.classes is None else ''}",
        f"Images: {len(run.x)}, each cropped to a square at the centre and resized to {size}x{size}.",
        times,
        memory.METHOD[run.device],
        RULE,
        TOP5_RULE,
    ]


@click.command("demo")
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=click.Path(path_type=Path))
@options.model
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="State dict, .pth or .safetensors.")
@click.option("--pretrained", is_flag=True, help="Download the weights of torchvision or timm.")
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Image or folder; else 8 photographs are used.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", default=8, help="Images per forward pass.")
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
    as_json: bool,
) -> None:
    """Compare a model, eager and accelerated, on photographs.

    Fails if the results differ by more than rounding. PATH: as for --images.
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

    import torch

    from convnext_kernels.cli import load, photos
    from convnext_kernels.environment import collect
    from convnext_kernels.interop import acceleration_report

    chosen = photos.read(images + paths, size) if images or paths else photos.shipped(size)
    loaded = load.load(model_name, weights, pretrained)
    if not acceleration_report(loaded.model).rows:
        raise click.ClickException(f"--model {loaded.name}: it has no ConvNeXt block, nothing to accelerate")
    x = photos.normalise(torch.stack([photo.pixels for photo in chosen]), *loaded.mean_std)
    run = _Run(loaded.model, x, batch, repeats, backend, device)
    with options.thread_count(threads):
        machine = collect()
        acceleration = acceleration_report(run.build(dtypes[0], "accelerated"))
        if not acceleration.replaced:
            reasons = "; ".join(dict.fromkeys(row.reason for row in acceleration.rows))
            raise click.ClickException(f"--model {loaded.name}: no module could be replaced: {reasons}")
        results = run.measure(tuple(dict.fromkeys(dtypes)))

    classes = loaded.classes if results[0].outputs == len(loaded.classes or ()) else None
    title = f"{loaded.name}, batch {batch}, {size}x{size}, {device}, weights: {loaded.weights}"
    notes = _notes(loaded, classes is not None, run)
    failures = [failure for result in results for failure in result.failures(chosen)]
    if as_json:
        head = {"model": loaded.name, "weights": loaded.weights, "batch": batch, "size": size, "repeats": repeats}
        head |= {"device": device, "backend": backend, "photographs": [photo.name for photo in chosen]}
        head |= {"modules": len(acceleration.rows), "replaced": acceleration.replaced}
        rest = {"results": _values(results), "failures": failures, "method": notes, "machine": machine}
        options.print_json(head | rest)
    else:
        _print(results, title, acceleration.replaced, failures)
    if not no_report:
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
        click.echo(f"Report: {report}", err=as_json)
    if failures:
        raise click.ClickException("; ".join(failures))
