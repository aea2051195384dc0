"""``convnext-kernels bench``: this package against its peers, from single ops to whole models."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, Case, select
from convnext_kernels.bench.conditions import start
from convnext_kernels.bench.results import FILE
from convnext_kernels.cli import options

if TYPE_CHECKING:
    from convnext_kernels.bench.results import Run

REPORT = Path("convnext-kernels-report/bench")
# Seconds that a case of each group takes on two cores, for the remaining time of the progress bar.
SECONDS = {"layernorm": 1, "dwconv": 1, "dwconv3d": 20, "mlp": 2, "block": 6, "model": 12, "rival": 6, "scaling": 20}


def measure(run: "Run", selected: Iterable[Case], folder: Path | None) -> None:
    """Measure cases into `run` and save it after each case, so that an interrupted run keeps what it measured."""
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
                save(run, folder / FILE)
            advance(case.name, SECONDS[case.group])
    run.complete = True
    if folder is not None:
        save(run, folder / FILE)


def show(run: "Run") -> None:
    """Print the tables, their legend and warnings."""
    from rich.text import Text

    from convnext_kernels.bench import terminal

    console = options.console()
    for table in terminal.tables(run):
        console.print(table)
    if run.records:
        console.print(Text(f"{terminal.LEGEND} {terminal.largest_error(run)}", "dim"))
    for line in terminal.absences(run):
        console.print(Text(f"not measured: {line}", "dim"))
    for line in run.conditions["warnings"]:
        console.print(Text(f"warning: {line}", "yellow"))
    for line in terminal.complaints(run):
        console.print(Text(line, "red"))


def finish(run: "Run", folder: Path | None, as_json: bool) -> None:
    """Print `run`, write its report; ClickException if this package gave wrong results or failed in a case."""
    from convnext_kernels.bench import results
    from convnext_kernels.bench.results import FAILED, OURS, WRONG

    if as_json:
        click.echo(results.as_json(run), nl=False)
        options.warn(run.conditions["warnings"])
    else:
        show(run)
    if folder is not None:
        from convnext_kernels.bench import report

        click.echo(report.write_if_possible(run, folder), err=as_json)
    bad = [r for r in run.records if r.candidate == OURS and r.status in (WRONG, FAILED)]
    if bad:
        count = len({r.case for r in run.records})
        raise click.ClickException(
            f"convnext_kernels is wrong or failed in {len(bad)} of {count} cases; the first is {bad[0].case}: "
            f"{bad[0].reason}"
        )


def check_folder(folder: Path | None) -> None:
    """Raise ClickException unless a report can be written to `folder` (None: no report)."""
    options.need("psutil", "bench", "bench")
    if folder is not None:
        options.need("jinja2", "the report", "bench")
        options.need("matplotlib", "the report", "bench")
        options.check_writable(folder / FILE, "--report")


def report_option(default: Path) -> Callable[..., object]:
    """Return the option --report with this default."""
    return click.option(
        "--report",
        "folder",
        type=click.Path(path_type=Path),
        default=default,
        metavar="DIR",
        help="Folder for report.html, charts and results.json.",
    )


def _case_names() -> list[str]:
    return [case.name for case in select(FULL)]


@click.command("bench")
@click.option("--quick", "mode", flag_value=QUICK, help="One stage, and ConvNeXt-T at batch 1: two minutes.")
@click.option("--full", "mode", flag_value=FULL, help="All cases, all peers and more rounds: hours.")
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    shell_complete=options.complete(_case_names),
    help="Only cases with this in their name, e.g. block or 'dwconv/K7*'.",
)
@click.option("--list", "as_list", is_flag=True, help="Print the names of the cases and exit.")
@options.threads
@options.auto_device
@report_option(REPORT)
@click.option("--no-report", is_flag=True, help="Write no files.")
@options.as_json
def command(
    mode: str | None,
    only: tuple[str, ...],
    as_list: bool,
    threads: int | None,
    device: str | None,
    folder: Path,
    no_report: bool,
    as_json: bool,
) -> None:
    """Time this package against eager PyTorch, torch.compile, OpenVINO and ONNX Runtime.

    Every candidate is checked against fp64 first, and timed only if its results are right. Takes about 15 minutes on
    two cores without --quick or --full. Fails if this package gives wrong results.
    """
    mode = mode or STANDARD
    device = options.device_or_default(device)
    try:
        selected = select(mode, only, device)
    except ValueError as error:
        raise click.ClickException(f"--only {error}") from error
    if as_list:
        names = [case.name for case in selected]
        if as_json:
            options.print_json(names)
        else:
            click.echo("\n".join(names))
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
                finish(run, folder, as_json)
            raise
        finish(run, folder, as_json)
