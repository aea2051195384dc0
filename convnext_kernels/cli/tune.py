"""``convnext-kernels tune``: time what a model may run on this machine and keep the fastest."""

from pathlib import Path

import click
import torch

import convnext_kernels
from convnext_kernels import dispatch, tuning
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.cli import load, options
from convnext_kernels.tuning import cache


@click.command("tune")
@options.model
@options.batch
@options.size
@options.dtype
@options.training
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Stop timing after this.")
@click.option("--write", type=options.Output(), metavar="FILE", help="Add the choices to a file.")
@click.option("--read", type=options.INPUT, metavar="FILE", help="Only read such a file.")
@options.threads
@options.device()
def command(
    model_name: str,
    batch: int,
    size: int,
    dtype: str,
    training: bool,
    minutes: float | None,
    write: Path | None,
    read: Path | None,
    device: str,
) -> None:
    """Time every way to compute each op of a model, eager too; keep the fastest."""
    if read is not None:
        found = tuning.load(read)
        prefixes = tuple(cache.prefix(dispatch.machine(device)) for device in ("cpu", device))
        usable = sum(key.startswith(prefixes) for key in found)
        click.echo(f"{len(found)} choices were read; {usable} of them are for this machine and these versions.")
        return
    loaded = load.load(model_name, pretrained=False)
    form = {"device": device, "dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    model = convnext_kernels.accelerate(loaded.model.to(**form))
    example = torch.randn(batch, 3, size, size).to(**form)
    with options.progress_bar("tune", None) as advance:
        report = convnext_kernels.tune(
            model,
            example,
            training=training,
            minutes=minutes,
            write=write,
            on_result=lambda timing: advance(f"{timing.op} {timing.phase} {timing.plan}"[:60], 1),
        )
    click.echo(f"{loaded.name}, {options.described(batch, size, dtype, training)}, ms of the fastest call, on {report}")
