"""The tables of `convnext-kernels report`, for Markdown and HTML: whole models, host time, tuned calls."""

from collections.abc import Iterable
from typing import NamedTuple

from convnext_kernels.bench.charts import number, speedup
from convnext_kernels.bench.lines import Line, of_kind
from convnext_kernels.bench.results import EAGER, OURS, Record, Run, is_ours, ratio


class Table(NamedTuple):
    """A table of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The table in Markdown."""
        head = [f"### {self.title}", "", f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in self.rows)])


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    return record.status if record.times is None else number(record.times.median)


def models(run: Run) -> Table:
    """Milliseconds of every candidate, and how the fastest of ours compares with eager and with the fastest peer."""
    cases = [case for case in run.cases().values() if next(iter(case.values())).group == "model"]
    names = list(dict.fromkeys(name for case in cases for name, record in case.items() if record.times is not None))
    rows = []
    for case in cases:
        first = next(iter(case.values()))
        timed = [record for record in case.values() if record.times is not None]
        ours = min((r for r in timed if is_ours(r.candidate)), key=lambda r: r.times.median, default=None)
        peer = min((r for r in timed if not is_ours(r.candidate)), key=lambda r: r.times.median, default=None)
        compared = []
        for other in (case.get(EAGER), peer):
            found = None if ours is None or other is None else ratio(case | {OURS: ours}, other.candidate)
            compared.append("-" if found is None else speedup(found.value, other.candidate))
        what = f"{first.what} {first.dtype}, batch {first.batch}, {first.direction}"
        rows.append((what, *(_cell(case.get(name)) for name in names), *compared))
    columns = ("model, ms", *names, "fastest of ours compared with eager", "with the fastest peer")
    return Table("Whole models", columns, rows)


def host(lines: Iterable[Line]) -> Table:
    """Host time of a call, in microseconds and in units of ten ``torch.add`` of one element."""
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for line in of_kind(lines, "host"):
        found.setdefault((line["what"], line["direction"]), {})[line["candidate"]] = line

    def cells(line: Line | None) -> tuple[str, str]:
        return ("-", "-") if line is None else (number(line["us"]), number(line["units"]))

    rows = [(*key, *cells(by.get("ours")), *cells(by.get("eager"))) for key, by in found.items()]
    return Table("Host time", ("call", "direction", "ours, us", "units", "eager, us", "units"), rows)


def tuned(lines: Iterable[Line]) -> Table:
    """The fastest candidate of every call that was tuned, compared with eager."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in of_kind(lines, "timing"):
        shape = "x".join(map(str, line["shape"]))
        what = " ".join(part for part in (line["op"], line.get("variant"), shape, line.get("dtype")) if part)
        found.setdefault((what, line["phase"]), []).append(line)
    rows = []
    for key, timings in found.items():
        timed = [t for t in timings if t["median"] is not None]
        best = min(timed, key=lambda t: t["median"], default=None)
        eager = min((t["median"] for t in timed if t["backend"] == EAGER), default=None)
        if best is None:
            rows.append((*key, str(len(timings)), "-", "-", "-", timings[0]["error"]))
            continue
        against = "-" if eager is None else speedup(eager / best["median"], EAGER)
        milliseconds = ("-" if eager is None else number(eager * 1e3), number(best["median"] * 1e3))
        rows.append((*key, str(len(timings)), *milliseconds, against, f"{best['backend']} {best['plan']}".strip()))
    columns = ("call", "phase", "candidates", "eager, ms", "fastest, ms", "compared", "fastest candidate")
    return Table("Tuned calls", columns, rows)


def tables(run: Run, lines: list[Line]) -> list[Table]:
    """All tables that have rows."""
    return [table for table in (models(run), host(lines), tuned(lines)) if table.rows]


def choices(lines: Iterable[Line]) -> dict[str, str]:
    """What `tune` chose: the entries of a file of measured choices."""
    return {key: name for line in of_kind(lines, "choices") for key, name in line["choices"].items()}
