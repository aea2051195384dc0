"""``convnext-kernels verify``: check and time every kernel of this machine, the most telling first."""

from pathlib import Path

import click

from convnext_kernels.bench import verify
from convnext_kernels.bench.lines import FILE
from convnext_kernels.bench.steps import STEPS
from convnext_kernels.cli import options


@click.command("verify")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Stop after N minutes.")
@click.option(
    "--only",
    multiple=True,
    metavar="STEP",
    shell_complete=options.complete(lambda: STEPS),
    help="Only steps with this in their name, can be repeated.",
)
@options.threads
@options.auto_device
@click.option(
    "--report",
    "folder",
    type=click.Path(path_type=Path),
    default=verify.REPORT,
    metavar="DIR",
    help=f"Folder for {FILE}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the lines instead of text.")
def command(
    minutes: float | None, only: tuple[str, ...], threads: int | None, device: str | None, folder: Path, as_json: bool
) -> None:
    """Check and time every kernel of this machine, the most telling first.

    Steps: precompile, numerics bf16, host time, CUDA graphs, models, candidates, tuned models, numerics fp32 and fp16.
    Without --minutes all of them run to their end: hours. Each result is appended to results.jsonl at once, so nothing
    is lost when the run is cut. `convnext-kernels report` makes tables of it. Fails if a kernel is wrong.
    """
    device = options.device_or_default(device)
    try:
        verify.check_only(only)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    options.check_writable(folder / FILE, "--report")
    run = verify.Verify(device, folder, minutes, only, threads, as_json, lambda line: click.echo(line, err=as_json))
    code = run.run()
    click.echo(verify.verdict(run, code), err=as_json or bool(code))
    click.get_current_context().exit(code)
