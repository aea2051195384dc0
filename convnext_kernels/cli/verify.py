"""``convnext-kernels verify``: every kernel of this machine against fp64, then the benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, select
from convnext_kernels.cli import bench, options

if TYPE_CHECKING:
    from convnext_kernels.bench.results import Check, Run

REPORT = Path("convnext-kernels-report/verify")


def _gpu_kernels_not_run(device: str) -> list[str]:
    """A line that says which kernels are not run, and why."""
    from convnext_kernels.environment import gpus

    found, reason = gpus()
    if not found:
        return [f"no kernel was run on a GPU: {reason}"]
    if device == "cpu":
        return ["no kernel was run on a GPU, because of --device cpu"]
    return ["no kernel was run on the CPU: `convnext-kernels verify --device cpu` does that"]


def check(run: "Run", folder: Path | None) -> None:
    """Check every kernel and add the results to `run`, which is saved at the end or when interrupted."""
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
    """The checks that show a broken kernel."""
    from convnext_kernels.bench.results import FAILED, WRONG

    return [c for c in checks if c.status in (WRONG, FAILED)]


def show(run: "Run") -> None:
    """Print a table of the checks by op and backend, and what could not be run."""
    from rich.text import Text

    from convnext_kernels.bench import terminal

    console = options.console()
    console.print(terminal.numerics(run))
    for c in bad(run.checks)[:20]:
        console.print(Text(f"{c.op} {c.what} {c.dtype} on {c.backend}: {c.status}: {c.reason}", "red"))
    for line in run.not_run:
        console.print(Text(f"not run: {line}", "yellow"))


@click.command("verify")
@click.option("--quick", "mode", flag_value=QUICK, help="Run the quick benchmark.")
@click.option("--full", "mode", flag_value=FULL, help="Run the full benchmark.")
@click.option("--no-bench", is_flag=True, help="Run no benchmark.")
@options.threads
@options.auto_device
@bench.report_option(REPORT)
@options.as_json
def command(
    mode: str | None, no_bench: bool, threads: int | None, device: str | None, folder: Path, as_json: bool
) -> None:
    """Check every kernel of every backend on this machine against fp64, then run the benchmark.

    Writes results.json, to keep or to send, and report.html. Says what could not be run here, for example GPU kernels
    on a machine without a GPU. Fails if a kernel is wrong.
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
            if not as_json:
                show(run)
            bench.measure(run, [] if no_bench else select(run.mode, (), device), folder)
        except KeyboardInterrupt:
            bench.finish(run, folder, as_json)
            raise
        bench.finish(run, folder, as_json)
    broken = bad(run.checks)
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(run.checks)} numerical checks failed: {broken[0].reason}")
    verified = sum(c.error is not None for c in run.checks)
    click.echo(f"{verified} numerical checks passed on {device}.", err=as_json)
