"""Counted figures with their limits, as a table on the terminal and in Markdown."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One counted figure and its limit; no kernel can be below `floor`."""

    what: str
    value: float
    floor: float
    limit: float | None
    unit: str

    @property
    def fails(self) -> bool:
        return self.limit is not None and self.value > self.limit


def _cells(f: Figure) -> tuple[str, ...]:
    limit = "" if f.limit is None else f"{f.limit:g}"
    return f.what, f"{f.value:.4g} {f.unit}".strip(), f"{f.floor:g}", limit, "MISSED" if f.fails else ""


def show(figures: list[Figure]) -> list[str]:
    """Print the figures; return those above their limit."""
    table = Table("figure", "counted", "floor", "limit", "")
    for f in figures:
        table.add_row(*_cells(f))
    Console(width=140).print(table)
    failed = [f.what for f in figures if f.fails]
    print(f"{len(figures)} figures counted, {len(failed)} above their limit; nothing ran on a GPU.")
    return failed


def page(title: str, text: str, figures: list[Figure]) -> str:
    """Return a page of records/: its title, what `text` says of the figures, their table."""
    rows = [f"| {' | '.join(_cells(f))} |" for f in figures]
    lines = [f"# {title}", "", text, "", "| figure | counted | floor | limit | |", "|---|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"
