"""``convnext-kernels compare``: what changed between two runs of ``bench``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.charts import number, short, speedup
from convnext_kernels.bench.compare import LEAST_NOISE
from convnext_kernels.bench.results import OURS
from convnext_kernels.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from convnext_kernels.bench.compare import Change, Summary
    from convnext_kernels.bench.results import Run

STYLES = {"faster": "green", "slower": "red", "status changed": "red"}


def read(file: Path) -> "Run":
    """Load a result file; ClickException names the file if that fails."""
    from convnext_kernels.bench.results import load

    try:
        return load(file)
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise click.ClickException(" ".join(str(error).split())) from error


def _verdict(change: "Change") -> str:
    """The verdict in a few letters: the tables fit 80 columns."""
    before, after = (
        "absent" if status == "unavailable" else status for status in (change.status_before, change.status_after)
    )
    if change.verdict == "status changed":
        return f"{before} > {after}"
    if change.verdict in ("faster", "slower"):
        return speedup(change.before / change.after)
    return {"no times": before, "within noise": "same"}.get(change.verdict, change.verdict)


def _tables(changes: "list[Change]") -> "Iterator[Table]":
    """A table for each group and direction; the names of its cases omit both."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[tuple[str, Change]]] = {}
    for change in changes:
        group, _, rest = change.case.partition("/")
        what, _, direction = rest.rpartition("-")
        groups.setdefault(f"{group}, {direction}", []).append((what, change))
    for title, found in groups.items():
        table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
        table.add_column("case", no_wrap=True)
        table.add_column("candidate", no_wrap=True)
        for column in ("A ms", "B ms", "noise", "B is"):
            table.add_column(column, justify="right", no_wrap=True)
        for what, c in found:
            times = ("" if value is None else number(value) for value in (c.before, c.after))
            noise = "" if c.noise is None else f"{100 * c.noise:.1f}%"
            verdict = Text(_verdict(c), STYLES.get(c.verdict, ""))
            candidate = Text("ours" if c.candidate == OURS else short(c.candidate))
            table.add_row(Text(what), candidate, *times, noise, verdict)
        yield table


def _lines(summary: "Summary", control: float) -> list[str]:
    """The summary as sentences."""
    if not summary.timed:
        return ["No candidate has times in both runs."]
    slower, faster = summary.counts.get("slower", 0), summary.counts.get("faster", 0)
    least = f"{100 * LEAST_NOISE:.0f}%"
    if control > LEAST_NOISE:
        least = f"{100 * control:.0f}%, which nine of ten peers do not exceed,"
    lines = [
        f"{summary.agree} of {summary.timed} times agree within the noise (the sum of both spreads, or {least} if that "
        f"is more). Beyond it, {faster} are faster and {slower} are slower in B.",
        f"Over all times B is {speedup(1 / summary.mean, 'A')} (geometric mean).",
    ]
    others = [f"{count} {name}" for name, count in summary.counts.items() if name.startswith(("only", "status"))]
    return [*lines, f"Not compared: {', '.join(others)}."] if others else lines


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("b", type=click.Path(path_type=Path), metavar="B.json")
@click.option("--all", "everything", is_flag=True, help="Show every candidate, also the unchanged ones.")
@options.as_json
def command(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Show what became faster or slower from A.json to B.json, two result files of `bench`.

    A change counts if it exceeds the noise: the sum of the spreads of both runs, or 2%, or the change that nine of ten
    peers do not exceed, whichever is most. This package cannot change its peers, so their changes show the noise of
    the machine. Warns if the runs are not comparable.
    """
    from rich.text import Text

    from convnext_kernels.bench.compare import NO_TIMES, SAME, compare, control, differences, gone_bad, summary

    runs = read(a), read(b)
    warnings, changes = differences(*runs), compare(*runs)
    summed = summary(changes)
    if as_json:
        values = {"a": str(a), "b": str(b), "warnings": warnings, "control": control(*runs)}
        options.print_json(values | {"summary": summed, "changes": changes})
        options.warn(warnings)
        return
    shown = changes if everything else [c for c in changes if c.verdict not in (SAME, NO_TIMES)]
    console = options.console()
    console.print(Text(f"A: {a}, {runs[0].created}\nB: {b}, {runs[1].created}", "dim"))
    for table in _tables(shown):
        console.print(table)
    for line in _lines(summed, control(*runs)):
        click.echo(line)
    for change in gone_bad(changes):
        text = f"no times in B any more: {change.case}, {change.candidate}: {change.status_after}"
        console.print(Text(text, "red"))
    for line in warnings:
        console.print(Text(f"warning: {line}", "yellow"))
