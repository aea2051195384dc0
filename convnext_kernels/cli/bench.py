"""``convnext-kernels bench``: this package against its peers, from single ops to whole models."""

import importlib
import time
from pathlib import Path

import click

from convnext_kernels.bench import ceilings, report
from convnext_kernels.bench.cases import FULL, GROUPS, QUICK, STANDARD, Case, select
from convnext_kernels.bench.conditions import start
from convnext_kernels.bench.measure import Session
from convnext_kernels.bench.results import FAILED, FILE, MODELS, OURS, WRONG, Run, save
from convnext_kernels.cli import options

REPORT = "convnext-kernels-report/bench"


def measure(run: Run, selected: list[Case], file: Path | None, session: Session) -> None:
    """Measure cases into `run` and save it after each case, so that an interrupted run keeps what it measured."""
    at_start, begun = list(run.conditions["warnings"]), time.perf_counter()
    with options.progress_bar("bench", sum(GROUPS[case.group] for case in selected)) as advance:
        for case in selected:
            run.records += session.measure(case, lambda what, case=case: advance(f"{case.name}: {what}", 0))
            run.seconds = time.perf_counter() - begun
            run.conditions["course"] = session.course.shares()
            run.conditions["warnings"] = at_start + session.course.warnings()
            run.complete = case is selected[-1]
            if file is not None:
                save(run, file)
            advance(case.name, GROUPS[case.group])


@click.command("bench")
@click.option("--quick", "mode", flag_value=QUICK, help="One stage, and ConvNeXt-T at batch 1: two minutes.")
@click.option("--full", "mode", flag_value=FULL, help="All cases, all peers and more rounds: hours.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Cases with this in their name: block, 'dwconv/K7*'.")
@options.threads
@options.device()
@click.option("--report", "folder", type=options.Output(FILE), default=REPORT, help="For results.json; '' for none.")
def command(mode: str | None, only: tuple[str, ...], device: str, folder: Path | None) -> None:
    """Time this package against eager PyTorch, torch.compile, OpenVINO and ONNX Runtime.

    Every candidate is checked against fp64 first, and timed only if its results are right. Takes about 15 minutes on
    two cores without --quick or --full. Fails if this package gives wrong results.
    """
    mode = mode or STANDARD
    selected = select(mode, only, device)
    for library in ("torchvision", "timm") if any(case.group in MODELS for case in selected) else ():
        importlib.import_module(library)  # now, not after minutes
    run = start(device, mode)
    run.ceilings = ceilings.measure(device)
    interrupted = None
    try:
        measure(run, selected, folder and folder / FILE, Session(device, mode))
    except KeyboardInterrupt as error:
        if not run.records:
            raise
        interrupted = error
        click.echo(f"Interrupted after {len(run.cases())} of {len(selected)} cases:", err=True)
    options.show(*report.times(run))
    if (share := report.error_share(r for r in run.records if r.candidate == OURS and r.times)) is not None:
        click.echo(f"The largest error of ours is {share:.0%} of the allowed one.")
    for line in report.absences(run):
        click.echo(f"not measured: {line}")
    for line in run.conditions["warnings"]:
        click.secho(f"warning: {line}", fg="yellow")
    for line in report.complaints(run):
        click.secho(line, fg="red")
    if folder is not None:
        click.echo(f"Results: {folder / FILE} (every figure: convnext-kernels report {folder / FILE})")
    if interrupted:
        raise interrupted
    bad = [r for r in run.records if r.candidate == OURS and r.status in (WRONG, FAILED)]
    if bad:
        what = f"wrong or failed in {len(bad)} of {len(run.cases())} cases"
        raise click.ClickException(f"convnext_kernels is {what}; the first is {bad[0].case}: {bad[0].reason}")
