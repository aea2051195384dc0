"""``convnext-kernels verify``: every kernel against fp64 on this machine, then the benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, select
from convnext_kernels.cli import bench, options

if TYPE_CHECKING:
    from convnext_kernels.bench.results import Check, Run

REPORT = Path("convnext-kernels-report/verify")


def _gpu_kernels_not_run(device: str) -> list[str]:
    """Lines that say which kernels this machine cannot run."""
    from convnext_kernels.environment import gpus

    lines = []
    found, reason = gpus()
    if not found:
        lines.append(f"no kernel was run on a GPU: {reason}")
    elif device == "cpu":
        lines.append("no kernel was run on a GPU: --device cpu was asked for")
    else:
        lines.append("no kernel was run on the CPU: `convnext-kernels verify --device cpu` does that")
    return lines


def check(run: "Run", folder: Path | None) -> None:
    """Add the numerics of every kernel to `run`, and what could not be run; saved when done or interrupted."""
    from convnext_kernels.bench import checks
    from convnext_kernels.bench.results import save

    dtypes = ("fp32", "bf16", "fp16")
    contexts, missing = checks.backends(run.device)
    run.not_run = _gpu_kernels_not_run(run.device) + missing
    try:
        with options.progress_bar("verify", checks.count(run.device, dtypes)) as advance:
            for found in checks.run(run.device, dtypes, contexts, lambda what: advance(what, 1)):
                run.checks.append(found)
    finally:
        if folder is not None:
            save(run, folder / bench.RESULTS)


def bad(checks: "list[Check]") -> "list[Check]":
    """The checks that say a kernel is broken."""
    from convnext_kernels.bench.results import FAILED, WRONG

    return [c for c in checks if c.status in (WRONG, FAILED)]


def show(run: "Run") -> None:
    """Print a table of numerics by op and backend, and what could not be run."""
    from rich.console import Console
    from rich.text import Text

    from convnext_kernels.bench import terminal

    console = Console()
    console.print(terminal.numerics(run), highlight=False)
    for c in bad(run.checks)[:20]:
        console.print(Text(f"{c.op} {c.what} {c.dtype} on {c.backend}: {c.status}: {c.reason}", "red"))
    for line in run.not_run:
        console.print(Text(f"not run: {line}", "yellow"))


@click.command("verify")
@click.option("--quick", "mode", flag_value=QUICK, help="The quick benchmark.")
@click.option("--full", "mode", flag_value=FULL, help="The full benchmark.")
@click.option("--no-bench", is_flag=True, help="Numerics only.")
@options.threads
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where PyTorch can use it, else cpu]")
@click.option(
    "--report",
    "folder",
    type=click.Path(path_type=Path),
    default=REPORT,
    show_default=True,
    metavar="DIR",
    help="Folder for report.html and results.json.",
)
def command(mode: str | None, no_bench: bool, threads: int | None, device: str | None, folder: Path) -> None:
    """Check every kernel of every backend against fp64 on this machine, then run the benchmark.

    Writes results.json, to be sent or kept, and report.html. Says what could not be run here, such as the GPU
    kernels on a machine without a GPU. Fails if a kernel is wrong.
    """
    device = options.device_or_default(device)
    bench.check_folder(folder)
    if not no_bench:
        for library in ("torchvision", "timm"):
            options.need(library, "cases of whole models", "bench")
    with options.thread_count(threads):
        run = bench.start(device, mode or STANDARD)
        try:
            check(run, folder)
            show(run)
            bench.measure(run, [] if no_bench else select(run.mode, (), device), folder)
        except KeyboardInterrupt:
            bench.finish(run, folder)
            raise
        bench.finish(run, folder)
    broken = bad(run.checks)
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(run.checks)} numerical checks failed: {broken[0].reason}")
    verified = sum(c.error is not None for c in run.checks)
    click.echo(f"{verified} numerical checks passed on {device}.")
