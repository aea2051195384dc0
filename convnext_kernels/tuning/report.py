"""What `tune` returns."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Timing(NamedTuple):
    """The time of one candidate for one call, or why it does not run."""

    op: str
    shape: tuple[int, ...]  # of x: N, C, H, W
    phase: str  # "forward" or "backward"
    backend: str
    plan: str  # "kernel: configuration" of every choice inside the backend; empty if it has none
    median: float | None  # seconds
    minimum: float | None
    error: str = ""
    dtype: str = ""  # of x
    variant: str = ""  # "V2 k7"


class Row(NamedTuple):
    """The result for one kind of call."""

    op: str
    shape: tuple[int, ...]
    phase: str
    dtype: str
    variant: str
    count: int  # calls of this kind in the model
    eager: float | None  # seconds: the minimum, which other processes disturb least; None if it does not run
    best: float | None
    backend: str  # the fastest, or the one that the model requests
    plan: str


@dataclass
class TuneReport:
    """What `tune` found. ``str()`` of it is a table."""

    machine: str
    rows: list[Row] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)  # as in the file that `write` names
    not_timed: list[str] = field(default_factory=list)  # a line for each call that the minutes did not suffice for

    def __str__(self) -> str:
        head = ("op", "shape", "phase", "calls", "eager ms", "best ms", "times faster than eager", "plan")
        lines = [head]
        for row in self.rows:
            known = row.eager is not None and row.best is not None
            lines.append(
                (
                    f"{row.op} {row.variant}".strip(),
                    "x".join(map(str, row.shape)) + f" {row.dtype}",
                    row.phase,
                    str(row.count),
                    _milliseconds(row.eager),
                    _milliseconds(row.best),
                    f"{row.eager / row.best:.2f}" if known else "-",
                    f"{row.backend} {row.plan}".strip(),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(line.rstrip() for line in (self.machine, *shown, *self.remarks()))

    def remarks(self) -> list[str]:
        """A line for each candidate that does not run and for each call that was not timed."""
        failed = [f"does not run: {describe(t)}: {t.error}" for t in self.timings if t.error]
        return failed + [f"not timed: {line}" for line in self.not_timed]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def describe(t: Timing | Row) -> str:
    """One line about a timing or a row."""
    shape = "x".join(map(str, t.shape))
    return " ".join(part for part in (t.op, t.variant, shape, t.dtype, t.phase, t.backend, t.plan) if part)
