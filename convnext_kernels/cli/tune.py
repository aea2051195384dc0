"""``convnext-kernels tune``: time what a model may run on this machine and keep the fastest."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.tables import Table, speedup
from convnext_kernels.cli import load, options

if TYPE_CHECKING:
    from convnext_kernels.tuning.report import TuneReport

NOTE = "eager, best: ms of the fastest call. Later calls on this machine take these choices from the user's cache."


def table(report: "TuneReport", title: str) -> Table:
    """A row for each kind of call."""
    rows = []
    for row in report.rows:
        times = ["-" if seconds is None else f"{seconds * 1e3:.4g}" for seconds in (row.eager, row.best)]
        faster = speedup(row.eager / row.best) if row.eager and row.best else "-"
        shape, what = "x".join(map(str, row.shape)), f"{row.op} {row.variant}".strip()
        rows.append((what, shape, row.phase, str(row.count), *times, faster, f"{row.backend} {row.plan}".strip()))
    return Table(title, ("op", "shape", "phase", "calls", "eager", "best", "vs eager", "plan"), rows, NOTE)


def _read(file: Path) -> None:
    from convnext_kernels import dispatch, tuning
    from convnext_kernels.tuning import cache

    try:
        found = tuning.load(file)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--read {file}: {getattr(error, 'strerror', None) or error}") from error
    prefixes = tuple(cache.prefix(dispatch.machine(device)) for device in ("cpu", options.device_or_default(None)))
    usable = sum(key.startswith(prefixes) for key in found)
    click.echo(f"{len(found)} choices were read; {usable} of them are for this machine and these versions.")


@click.command("tune")
@options.model
@options.batch
@options.size
@options.dtype
@options.training
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Stop timing after this.")
@click.option("--write", type=click.Path(path_type=Path), metavar="FILE", help="Add the choices to a file.")
@click.option("--read", type=click.Path(path_type=Path), metavar="FILE", help="Only read such a file.")
@options.threads
@options.auto_device
@options.as_json
def command(
    model_name: str,
    batch: int,
    size: int,
    dtype: str,
    training: bool,
    minutes: float | None,
    write: Path | None,
    read: Path | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Time every way to compute each op of a model, eager too; keep the fastest."""
    if read is not None:
        _read(read)
        return
    import torch

    import convnext_kernels

    device = options.device_or_default(device)
    if write is not None:
        options.check_writable(write, "--write")
    loaded = load.load(model_name, None, pretrained=False)
    form = {"device": device, "dtype": getattr(torch, options.DTYPES[dtype]), "memory_format": torch.channels_last}
    model = convnext_kernels.accelerate(loaded.model.to(**form))
    example = torch.randn(batch, 3, size, size).to(**form)
    with options.thread_count(threads), options.progress_bar("tune", None) as advance:
        try:
            report = convnext_kernels.tune(
                model,
                example,
                training=training,
                minutes=minutes,
                write=write,
                on_result=lambda timing: advance(f"{timing.op} {timing.phase} {timing.plan}"[:60], 1),
            )
        except ValueError as error:
            raise click.ClickException(f"--model {loaded.name}: {error}") from error
    if as_json:
        head = {"model": loaded.name, "batch": batch, "size": size, "dtype": dtype, "training": training}
        rows, timings = ([item._asdict() for item in items] for items in (report.rows, report.timings))
        found = {"machine": report.machine, "choices": report.choices, "not_timed": report.not_timed}
        options.print_json(head | found | {"rows": rows, "timings": timings})
        return
    title = f"{loaded.name} on {report.machine}, {options.described(batch, size, dtype, training)}"
    options.show(table(report, title), width=160)
    for line in report.remarks():
        click.echo(line)
