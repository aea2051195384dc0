"""``convnext-kernels compare``: what moved between two runs of ``bench``."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convnext_kernels.bench.compare import FLOOR
from convnext_kernels.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from convnext_kernels.bench.compare import Change, Summary
    from convnext_kernels.bench.results import Run

STYLES = {"faster": "green", "slower": "red", "status changed": "red"}


def read(file: Path) -> "Run":
    """Load a result file; ClickException names the file where that fails."""
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
    return {"no times": before, "within noise": "same"}.get(change.verdict, change.verdict)


def _tables(changes: "list[Change]") -> "Iterator[Table]":
    """A table for each group and direction, whose names the cases then do without."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from convnext_kernels.bench.charts import number, short
    from convnext_kernels.bench.results import OURS

    groups: dict[str, list[tuple[str, Change]]] = {}
    for change in changes:
        group, _, rest = change.case.partition("/")
        what, _, direction = rest.rpartition("-")
        groups.setdefault(f"{group}, {direction}", []).append((what, change))
    for title, found in groups.items():
        table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
        table.add_column("case", no_wrap=True)
        table.add_column("candidate", no_wrap=True)
        for column in ("A ms", "B ms", "change", "noise"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict")
        for what, c in found:
            times = ("" if value is None else number(value) for value in (c.before, c.after))
            change = "" if c.change is None else f"{100 * c.change:+.1f}%"
            noise = "" if c.noise is None else f"{100 * c.noise:.1f}%"
            style = STYLES.get(c.verdict, "")
            cells = (*times, Text(change, style), noise, Text(_verdict(c), style))
            table.add_row(Text(what), Text("ours" if c.candidate == OURS else short(c.candidate)), *cells)
        yield table


def _lines(summary: "Summary", control: float) -> list[str]:
    """The figures in words."""
    if not summary.timed:
        return ["No candidate has times in both runs."]
    slower, faster = summary.counts.get("slower", 0), summary.counts.get("faster", 0)
    least = f"{100 * control:.0f}%, which nine of ten peers stayed below" if control > FLOOR else f"{100 * FLOOR:.0f}%"
    lines = [
        f"{summary.agree} of {summary.timed} times agree within the stated noise (the sum of both spreads, or {least} "
        f"if that is more); beyond it {faster} are faster and {slower} slower in B.",
        f"Geometric mean of B / A over all times: {summary.mean:.3f}.",
    ]
    others = [f"{count} {name}" for name, count in summary.counts.items() if name.startswith(("only", "status"))]
    return [*lines, f"Not compared: {', '.join(others)}."] if others else lines


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("b", type=click.Path(path_type=Path), metavar="B.json")
@click.option("--all", "everything", is_flag=True, help="Show every candidate, not only what moved.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the comparison to this file.")
def command(a: Path, b: Path, everything: bool, json_file: Path | None) -> None:
    """Compare two result files of `bench`: what became faster or slower in B than in A, beyond the noise.

    Noise is the sum of the spreads of both runs, or what nine of ten peers, which no change of this package moves,
    stayed below, or 2 %, whichever is most. Warns where the runs are not comparable.
    """
    from rich.console import Console
    from rich.text import Text

    from convnext_kernels.bench.compare import NO_TIMES, SAME, compare, control, differences, gone_bad, summary

    runs = read(a), read(b)
    if json_file is not None:
        options.check_writable(json_file, "--json")
    warnings, changes = differences(*runs), compare(*runs)
    summed = summary(changes)
    shown = changes if everything else [c for c in changes if c.verdict not in (SAME, NO_TIMES)]
    console = Console()
    console.print(Text(f"A: {a}, {runs[0].created}\nB: {b}, {runs[1].created}", "dim"))
    for table in _tables(shown):
        console.print(table, highlight=False)
    for line in _lines(summed, control(*runs)):
        click.echo(line)
    for change in gone_bad(changes):
        text = f"no speed in B any more: {change.case}, {change.candidate}: {change.status_after}"
        console.print(Text(text, "red"))
    for line in warnings:
        console.print(Text(f"warning: {line}", "yellow"))
    if json_file is not None:
        values = {
            "a": str(a),
            "b": str(b),
            "warnings": warnings,
            "control": control(*runs),
            "summary": dataclasses.asdict(summed),
            "changes": [dataclasses.asdict(change) for change in changes],
        }
        json_file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
