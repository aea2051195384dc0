"""``convnext-kernels verify``: every kernel of this machine against fp64, then the benchmark."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench import verify
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, select
from convnext_kernels.bench.results import FILE
from convnext_kernels.cli import bench, options

if TYPE_CHECKING:
    from convnext_kernels.bench.results import Run


def show(run: "Run") -> None:
    """Print a table of the checks by op and backend, and what could not be run."""
    from rich.text import Text

    from convnext_kernels.bench import terminal

    console = options.console()
    console.print(terminal.numerics(run))
    for line in verify.complaints(run):
        console.print(Text(line, "red"))
    for line in run.not_run:
        console.print(Text(f"not run: {line}", "yellow"))


@click.command("verify")
@click.option("--quick", "mode", flag_value=QUICK, help="Run the quick benchmark.")
@click.option("--full", "mode", flag_value=FULL, help="Run the full benchmark.")
@click.option("--no-bench", is_flag=True, help="Run no benchmark.")
@options.threads
@options.auto_device
@bench.report_option(verify.REPORT)
@options.as_json
def command(
    mode: str | None, no_bench: bool, threads: int | None, device: str | None, folder: Path, as_json: bool
) -> None:
    """Check every kernel of every backend on this machine against fp64, then run the benchmark.

    Writes results.json, to keep or to send, and report.html. Says what could not be run here, for example GPU kernels
    on a machine without a GPU. Fails if a kernel is wrong.
    """
    device = options.device_or_default(device)
    options.check_writable(folder / FILE, "--report")
    lacking = [name for name in ("psutil", "torchvision", "timm") if importlib.util.find_spec(name) is None]
    with options.thread_count(threads):
        run = bench.start(device, mode or STANDARD)
        try:
            with options.progress_bar("verify", verify.count(device)) as advance:
                verify.check(run, folder, lambda what: advance(what, 1))
            if lacking and not no_bench:
                run.not_run.append(
                    f'the benchmark, which needs {", ".join(lacking)}: pip install "convnext-kernels[bench]"'
                )
            if not as_json:
                show(run)
            bench.measure(run, [] if no_bench or lacking else select(run.mode, (), device), folder)
        except KeyboardInterrupt:
            bench.finish(run, folder, as_json)
            raise
        bench.finish(run, folder, as_json)
    passed, sentence = verify.verdict(run)
    if not passed:
        raise click.ClickException(sentence)
    click.echo(sentence, err=as_json)
