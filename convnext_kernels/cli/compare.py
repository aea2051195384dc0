"""``convnext-kernels compare``: what changed between two runs of ``bench``."""

from pathlib import Path

import click

from convnext_kernels.bench import compare
from convnext_kernels.bench.results import load
from convnext_kernels.cli import options


@click.command("compare")
@click.argument("a", type=options.FILE, metavar="A.json")
@click.argument("b", type=options.FILE, metavar="B.json")
def command(a: Path, b: Path) -> None:
    """Show what became faster or slower from A.json to B.json, two result files of `bench`.

    A change counts if it exceeds the noise: the sum of the spreads of both runs, or 2%, or the change that nine of ten
    peers do not exceed, whichever is most. This package cannot change its peers, so their changes show the noise of
    the machine. Warns if the runs are not comparable.
    """
    runs = [load(file) for file in (a, b)]
    warnings, changes, moved = compare.differences(*runs), compare.compare(*runs), compare.control(*runs)
    for name, file, run in zip("AB", (a, b), runs, strict=True):
        click.echo(f"{name}: {file}, {run.created}")
    shown = [c for c in changes if c.verdict not in (compare.SAME, compare.NO_TIMES)]
    if shown:
        options.show(compare.table(shown))
    for line in compare.sentences(changes, moved):
        click.echo(line)
    for c in changes:
        if c.gone_bad:
            click.secho(f"no times in B any more: {c.b.case}, {c.b.candidate}: {c.b.status}", fg="red")
    for line in warnings:
        click.secho(f"warning: {line}", fg="yellow")
