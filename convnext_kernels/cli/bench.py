"""``convnext-kernels bench``: this package against its peers, from single ops to whole models."""

import datetime
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, Case, select
from convnext_kernels.cli import options

if TYPE_CHECKING:
    from convnext_kernels.bench.results import Run

RESULTS = "results.json"
REPORT = Path("convnext-kernels-report/bench")
# How long a case of each group takes next to the others, for the remaining time: seconds on two cores.
SECONDS = {"layernorm": 1, "dwconv": 1, "mlp": 2, "block": 6, "model": 12, "rival": 6, "scaling": 20}


def start(device: str, mode: str) -> "Run":
    """Look at the machine, measure its ceilings and return a run without records."""
    from convnext_kernels import environment
    from convnext_kernels.bench import ceilings, conditions
    from convnext_kernels.bench.results import Run

    machine = environment.collect() | {"commit": environment.commit()}
    found = conditions.collect(device)
    created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return Run(machine, found, ceilings.measure(device), device, mode, created)


def measure(run: "Run", selected: Iterable[Case], folder: Path | None) -> None:
    """Measure cases into `run` and save it after each of them; an interruption leaves what there is, and is raised."""
    from convnext_kernels.bench.measure import Session
    from convnext_kernels.bench.results import save

    selected = list(selected)
    session = Session(run.device, run.mode, run.ceilings)
    at_start, begun = list(run.conditions["warnings"]), time.perf_counter()
    with options.progress_bar("bench", sum(SECONDS[case.group] for case in selected)) as advance:
        for case in selected:
            run.records += session.measure(case, lambda what, case=case: advance(f"{case.name}: {what}", 0))
            run.seconds = time.perf_counter() - begun
            run.conditions["course"] = session.course.summary()
            run.conditions["warnings"] = at_start + session.course.warnings()
            if folder is not None:
                save(run, folder / RESULTS)
            advance(case.name, SECONDS[case.group])
    run.complete = True
    if folder is not None:
        save(run, folder / RESULTS)


def show(run: "Run") -> None:
    """Print the tables and what the reader must know to judge them."""
    from rich.console import Console
    from rich.text import Text

    from convnext_kernels.bench import terminal
    from convnext_kernels.bench.numerics import BENCH_RULE

    console = Console()
    for table in terminal.tables(run):
        console.print(table, highlight=False)
    if run.records:
        console.print(Text(f"{terminal.LEGEND} {BENCH_RULE}", "dim"))
    for line in terminal.absences(run):
        console.print(Text(f"not measured: {line}", "dim"))
    for line in run.conditions["warnings"]:
        console.print(Text(f"warning: {line}", "yellow"))
    for line in terminal.complaints(run):
        console.print(Text(line, "red"))


def finish(run: "Run", folder: Path | None) -> None:
    """Show `run`, write its report and fail if a candidate of ours was wrong or failed."""
    from convnext_kernels.bench.results import FAILED, OURS, WRONG

    show(run)
    if folder is not None:
        from convnext_kernels.bench import report

        report.write(run, folder)
        click.echo(f"Report: {folder / 'report.html'}, results: {folder / RESULTS}")
    bad = [r for r in run.records if r.candidate == OURS and r.status in (WRONG, FAILED)]
    if bad:
        count = len({r.case for r in run.records})
        raise click.ClickException(f"convnext_kernels gave no speed in {len(bad)} of {count} cases: {bad[0].reason}")


def check_folder(folder: Path | None) -> None:
    """Raise ClickException unless a report can be written to `folder` (None: no report is wanted)."""
    options.need("psutil", "bench", "bench")
    if folder is not None:
        options.need("jinja2", "the report", "bench")
        options.need("matplotlib", "the report", "bench")
        options.check_writable(folder / RESULTS, "--report")


report_option = click.option(
    "--report",
    "folder",
    type=click.Path(path_type=Path),
    default=REPORT,
    show_default=True,
    metavar="DIR",
    help="Folder for report.html, its charts as PNG, and results.json, which is saved after every case.",
)


@click.command("bench")
@click.option("--quick", "mode", flag_value=QUICK, help="One stage and ConvNeXt-T at batch 1: under two minutes.")
@click.option("--full", "mode", flag_value=FULL, help="Every case and every peer in it, and more rounds: hours.")
@click.option(
    "--only", multiple=True, metavar="PATTERN", help="Cases with this in their name, e.g. block or 'dwconv/K7*'."
)
@click.option("--list", "as_list", is_flag=True, help="List the names of the cases and leave.")
@options.threads
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where PyTorch can use it, else cpu]")
@report_option
@click.option("--no-report", is_flag=True, help="Write nothing, print the tables only.")
def command(
    mode: str | None,
    only: tuple[str, ...],
    as_list: bool,
    threads: int | None,
    device: str | None,
    folder: Path,
    no_report: bool,
) -> None:
    """Time this package against eager PyTorch, torch.compile and, on a CPU, OpenVINO and ONNX Runtime.

    Every candidate is checked against fp64 first and gets a time only when it is right; candidates of a case are
    timed in turn in one process. Without --quick or --full it takes some 15 minutes on two cores. Fails where
    this package gives wrong results.
    """
    mode = mode or STANDARD
    device = options.device_or_default(device)
    try:
        selected = select(mode, only, device)
    except ValueError as error:
        raise click.ClickException(f"--only {error}") from error
    if as_list:
        click.echo("\n".join(case.name for case in selected))
        return
    folder = None if no_report else folder
    check_folder(folder)
    from convnext_kernels.bench.results import MODELS

    for library in ("torchvision", "timm"):
        if any(case.group in MODELS for case in selected):
            options.need(library, "cases of whole models", "bench")
    with options.thread_count(threads):
        run = start(device, mode)
        try:
            measure(run, selected, folder)
        except KeyboardInterrupt:
            if run.records:
                click.echo(f"Interrupted after {len(run.cases())} of {len(selected)} cases:", err=True)
                finish(run, folder)
            raise
        finish(run, folder)
