"""Numbers, tables and pages: for a terminal, in Markdown, in HTML. rich and jinja2 are imported late."""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convnext_kernels.tuning import cache

if TYPE_CHECKING:
    from rich.table import Table as RichTable

GOOD = re.compile(r"(yes|met|.*\bfaster)$")
BAD = re.compile(r"(no|wrong|failed|slower|MISSED|EXCEEDED|ok > .*|.*\dx slower)$")


def number(value: float) -> str:
    """Format with three significant digits, but all digits before the point, and no exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def one_line(error: BaseException, most: int = 300) -> str:
    """An error as one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.{most}}"


def optional(value: float | None) -> str:
    """The same, "-" for None."""
    return "-" if value is None else number(value)


def short(candidate: str) -> str:
    """Return the distinctive part of a name: "max-autotune" of "torch.compile, max-autotune"."""
    return {"convnext_kernels": "ours"}.get(candidate, candidate.rpartition(", ")[2])


def speedup(factor: float | None, than: str = "") -> str:
    """Format a speed-up: "1.35x faster" or, with `than`, "1.35 times faster than eager"; "-" for None.

    `factor` is the time of `than` over the time of this package; below 1 the text is "1.11x slower".
    """
    if factor is None:
        return "-"
    times, verb = number(max(factor, 1 / factor)), "faster" if factor > 1 else "slower"
    if math.isclose(factor, 1, rel_tol=1e-3):
        return f"as fast as {than}" if than else "as fast"
    return f"{times} times {verb} than {than}" if than else f"{times}x {verb}"


def look(cell: str) -> str:
    """How a cell is coloured: "good", "bad" or ""."""
    return "good" if GOOD.match(cell) else "bad" if BAD.match(cell) else ""


class Table(NamedTuple):
    """A table of text. Columns of figures are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def right(self) -> list[bool]:
        """For each column, whether it holds figures."""
        return [
            bool(self.rows) and all(re.match(r"-?$|(?!\d+x\d)[±+-]?\d", row[i]) for row in self.rows)
            for i in range(len(self.columns))
        ]

    def markdown(self) -> str:
        """The table in Markdown."""
        head = [f"### {self.title}", ""] if self.title else []
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        return "\n".join([*head, *lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def rich(self) -> "RichTable":
        """The table for a terminal, one space between its columns."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        colours = {"good": "green", "bad": "red", "": ""}
        table = RichTable(
            title=Text(self.title), caption=Text(self.note), caption_justify="left", box=box.SIMPLE, padding=0
        )
        table.pad_edge, table.show_header = False, any(self.columns)
        for column, right in zip(self.columns, self.right(), strict=True):
            table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
        for row in self.rows:  # Text, not str: rich would read square brackets as markup
            table.add_row(*(Text(cell, colours[look(cell)]) for cell in row))
        return table


def machine(values: dict[str, object]) -> list[Table]:
    """The backends, and versions and machine, of what `environment.collect` found."""
    from convnext_kernels import environment

    rows = [
        (name, "yes" if status["available"] else "no", status["reason"] or status["description"])
        for name, status in values["backends"].items()
    ]
    columns = ("backend", "available", "description, or why it cannot run")
    return [
        Table("Backends, best first", columns, rows),
        Table("Versions and machine", ("", ""), environment.rows(values)),
    ]


def date(created: str | None = None) -> str:
    """A moment (ISO 8601), or now, for a reader."""
    moment = datetime.datetime.fromisoformat(created) if created else datetime.datetime.now().astimezone()
    return moment.strftime("%Y-%m-%d %H:%M %Z").strip()


def write_page(file: Path, title: str, about: str, sections: Mapping[str, Sequence[str | Table]]) -> None:
    """Write a page to `file`; OSError if that fails. `about` is a line below the title; texts are escaped.

    `sections`: texts and tables by title. A section without parts is left out.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convnext_kernels.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja")
    cache.replace(file, page.render(title=title, about=about, sections=sections, look=look))
