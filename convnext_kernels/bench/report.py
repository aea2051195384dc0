"""The HTML report of a run, a single file, and its charts as PNG files."""

import dataclasses
import datetime
import importlib.util
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convnext_kernels.bench import charts
from convnext_kernels.bench.charts import number, speedup
from convnext_kernels.bench.results import (
    EAGER,
    FAILED,
    FILE,
    OK,
    OURS,
    UNAVAILABLE,
    WRONG,
    Check,
    Ratio,
    Record,
    Run,
    best_peer,
    ratio,
    write_atomically,
)

NAME = "report.html"
Case = dict[str, Record]  # by candidate
Row = charts.RatioRow | charts.ModelRow

PNG_DPI = 160
FEW = 12  # a list of more cases is folded

COLUMNS = (
    "median ms",
    "min ms",
    "spread",
    "convnext_kernels is",
    "error / allowed",
    "GFLOP/s",
    "GB/s",
    "of arithmetic",
    "of memory",
    "images/s",
    "kept MiB",
    "launches",
    "backend",
)


@dataclass(frozen=True)
class Summary:
    """Speed-ups of this package over some cases: geometric means of `results.ratio`, None without any."""

    cases: int  # that have a time of this package and of a peer
    to_eager: float | None
    to_peer: float | None
    slower_than_eager: int
    slower_than_peer: int


def summarise(cases: Iterable[Case]) -> Summary:
    """Sum up the cases in which this package and at least one peer have times."""
    to_eager, to_peer = [], []
    for case in cases:
        peer = best_peer(case)
        found = ratio(case, peer.candidate) if peer is not None else None
        if found is not None:
            to_peer.append(found.value)
            eager = ratio(case)
            to_eager += [] if eager is None else [eager.value]
    return Summary(
        len(to_peer),
        statistics.geometric_mean(to_eager) if to_eager else None,
        statistics.geometric_mean(to_peer) if to_peer else None,
        sum(value < 1 for value in to_eager),
        sum(value < 1 for value in to_peer),
    )


def by(run: Run, key: Callable[[Record], object]) -> dict[object, list[Case]]:
    """Cases by `key` of one of their records, in the order they were measured."""
    found: dict[object, list[Case]] = {}
    for case in run.cases().values():
        found.setdefault(key(next(iter(case.values()))), []).append(case)
    return found


def machine_name(run: Run) -> str:
    """Name of the measured device: the GPU or the CPU."""
    found = run.machine.get("gpus") or []
    return str(found[0]).partition(",")[0] if run.device == "cuda" and found else run.machine["cpu"]["name"]


def _with_range(found: Ratio) -> str:
    """Format a speed-up and its range over the rounds: "1.35x faster (1.30 to 1.41)"."""
    value, low, high = (speedup(factor) for factor in (found.value, found.low, found.high))
    if len({text.partition(" ")[2] for text in (value, low, high)}) == 1:
        low, high = (text.partition("x ")[0] for text in ((low, high) if found.value > 1 else (high, low)))
    return f"{value} ({low} to {high})"


def _panels(cases: list[Case], row: Callable[[Case], Row | None]) -> list[charts.Panel]:
    """One panel for each direction, dtype and batch; panels of a single row are merged into one."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for case in cases:
        first, made = next(iter(case.values())), row(case)
        if made is not None:
            found.setdefault((first.direction, first.dtype, first.batch), []).append(made)
    panels, single = [], {}
    for (direction, dtype, batch), rows in sorted(found.items(), key=lambda item: item[0][0]):
        if len(rows) > 1:
            panels.append(charts.Panel(f"{dtype}, batch {batch}, {direction}", rows))
        else:
            alone = dataclasses.replace(rows[0], what=f"{rows[0].what} {dtype} b{batch}")
            single.setdefault(direction, []).append(alone)
    return panels + [charts.Panel(direction, rows) for direction, rows in single.items()]


def _ratio_row(case: Case) -> charts.RatioRow | None:
    ours, peer = case.get(OURS), best_peer(case)
    if ours is None or ours.status == UNAVAILABLE:
        return None
    if ours.times is None or peer is None:
        why = ours.status if ours.times is None else "no peer"
        return charts.RatioRow(ours.what, None, None, why)
    return charts.RatioRow(ours.what, ratio(case), ratio(case, peer.candidate), peer.candidate)


def _model_row(case: Case) -> charts.ModelRow | None:
    first, eager, ours, peer = next(iter(case.values())), case.get(EAGER), case.get(OURS), best_peer(case)
    if peer is None and (ours is None or ours.times is None):
        return None
    rate = [None if record is None else record.images_per_second for record in (eager, peer, ours)]
    name = "" if peer is None else peer.candidate
    parameters = next((r.parameters for r in case.values() if r.parameters), None)
    flops = max(record.flops for record in case.values()) // max(1, first.batch)
    return charts.ModelRow(first.what, first.group == "rival", rate[0], rate[1], name, rate[2], flops, parameters)


def check_rows(run: Run) -> list[tuple[str, ...]]:
    """Checks of `verify` by op, backend and dtype: numbers of passed, failed and unsupported ones, largest error."""
    found: dict[tuple[str, str, str], list[Check]] = {}
    for check in run.checks:
        found.setdefault((check.op, check.backend, check.dtype), []).append(check)
    rows = []
    for key, checks in found.items():
        counts = Counter("bad" if check.status in (WRONG, FAILED) else check.status for check in checks)
        worst = max((check for check in checks if check.error is not None), key=_share, default=None)
        counted = (str(counts[name]) for name in (OK, "bad", UNAVAILABLE))
        rows.append((*key, *counted, "" if worst is None else error_share(worst)))
    return rows


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _share(found: Record | Check) -> float:
    """Error over the allowed error; infinite for NaN, so that NaN counts as the largest."""
    if not found.allowed_error:
        return 0.0 if found.error == 0 else math.inf
    share = found.error / found.allowed_error
    return math.inf if math.isnan(share) else share


def error_share(found: Record | Check) -> str:
    """Format the error over the allowed error."""
    if found.error is None or found.allowed_error is None:
        return ""
    share = _share(found)
    return "NaN" if math.isnan(found.error) else ">100" if share > 100 else f"{share:.2f}"


def _cells(record: Record, case: Case) -> list[str]:
    """Return a cell for each of COLUMNS, for a record with times."""
    against = ratio(case, record.candidate) if record.candidate != OURS else None
    return [
        number(record.times.median),
        number(record.times.minimum),
        f"±{_percent(record.times.spread, 1)}",
        "" if against is None else _with_range(against),
        error_share(record),
        number(record.gflops) if record.flops else "",
        number(record.gbytes) if record.bytes else "",
        _percent(record.compute_share),
        _percent(record.memory_share),
        "" if record.images_per_second is None else number(record.images_per_second),
        "" if record.saved_bytes is None else number(record.saved_bytes / 2**20),
        "" if record.launches is None else str(record.launches),
        record.backend or "",
    ]


def _work(case: Case) -> str:
    record = max(case.values(), key=lambda record: record.bytes)  # a record without times does not have it
    parts = [f"{number(record.flops / 1e9)} GFLOP"] if record.flops else []
    parts += [f"at least {number(record.bytes / 1e6)} MB"] if record.bytes else []
    parts += [f"{number(record.parameters / 1e6)} M parameters"] if record.parameters else []
    return ", ".join(parts)


def _tables(run: Run) -> list[dict[str, object]]:
    """The table of all results: groups, their cases, their records; unavailable ones are listed elsewhere.

    Columns that are empty for a group are omitted.
    """
    found = []
    for group, cases in by(run, lambda record: record.group).items():
        entries = []
        for case in cases:
            records = [record for record in case.values() if record.status != UNAVAILABLE]
            first, best = next(iter(case.values())), best_peer(case)
            rows = [
                {
                    "record": record,
                    "ours": record.candidate == OURS,
                    "best": record is best,
                    "cells": _cells(record, case) if record.status == OK and record.times else None,
                    "error": error_share(record),
                }
                for record in records
            ]
            entries.append({"name": first.case, "work": _work(case), "rows": rows})
        rows = [row for entry in entries for row in entry["rows"]]
        cells = [row["cells"] for row in rows if row["cells"] is not None]
        used = [index for index in range(len(COLUMNS)) if any(line[index] for line in cells)]
        for row in rows:
            row["cells"] = row["cells"] and [row["cells"][index] for index in used]
        columns = [COLUMNS[index] for index in used]
        found.append({"name": group, "cases": entries, "records": len(rows), "columns": columns})
    return found


def _losses(run: Run) -> list[dict[str, str]]:
    """Every case in which a peer is faster than this package, largest loss first."""
    found = []
    for name, case in run.cases().items():
        peer = best_peer(case)
        against = ratio(case, peer.candidate) if peer is not None else None
        if against is not None and against.value < 1:
            found.append((against.value, name, case[OURS], peer, against))
    return [
        {
            "case": name,
            "ours": number(ours.times.median),
            "peer": peer.candidate,
            "theirs": number(peer.times.median),
            "speedup": _with_range(against),
        }
        for _, name, ours, peer, against in sorted(found, key=lambda loss: loss[:2])
    ]


def flat(value: object) -> str:
    """Format plain values of a result file as one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {flat(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(flat, value))
    if isinstance(value, float):
        return number(value)
    return "none" if value is None or value == "" else str(value)


def _ceilings(run: Run) -> list[tuple[str, str, str]]:
    """Return (what, rate, source) of each measured ceiling."""
    sources = run.ceilings.get("sources", {})
    found = [
        (
            "fp32 multiply-adds without matrix units" if name == "vector" else f"{name} matmul",
            f"{number(rate / 1e9)} GFLOP/s",
            sources.get(name, ""),
        )
        for name, rate in run.ceilings.get("flops", {}).items()
    ]
    for level in run.ceilings.get("memory", []):
        size = "" if level["size"] is None else f", working sets up to {number(level['size'] / 2**20)} MiB"
        found.append((level["level"] + size, f"{number(level['rate'] / 1e9)} GB/s", sources.get("memory", "")))
    return found


def _date(created: str) -> str:
    try:
        return datetime.datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return created


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _draw(run: Run, folder: Path) -> tuple[dict[str, object], list[Path]]:
    """Draw all charts; returns the SVGs for the template, and the PNG files."""
    files = []

    def png(name: str, figure: object) -> None:
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=PNG_DPI, facecolor="white")

    found: dict[str, object] = {"ratios": [], "models": [], "roofline": None, "scaling": None}
    for group, cases in by(run, lambda record: record.group).items():
        if group == "scaling":  # a chart of its own
            continue
        panels = _panels(cases, _ratio_row)
        if not panels:
            continue
        found["ratios"].append((group, [(p.title, charts.svg(charts.ratios(group, panels, p))) for p in panels]))
        png(f"ratios-{group}", charts.ratios(group, panels))
    panels = _panels([c for g in ("model", "rival") for c in by(run, lambda r: r.group).get(g, [])], _model_row)
    if panels:
        found["models"] = [(panel, charts.svg(charts.models(panels, panel))) for panel in panels]
        png("models", charts.models(panels))
    figure = charts.scaling(run)
    if figure is not None:
        found["scaling"] = charts.svg(figure)
        png("scaling", figure)
    figure = charts.roofline(run)
    if figure is not None:
        found["roofline"] = charts.svg(figure)
        png("roofline", figure)
    return found, files


def missing() -> str:
    """Why no report can be written here, and how to change that; "" if one can."""
    names = " and ".join(name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None)
    return f'the report needs {names}, which is not installed: pip install "convnext-kernels[bench]"' if names else ""


def write(run: Run, folder: Path, tables: Sequence[object] = ()) -> list[Path]:
    """Write ``report.html``, with further `tables`, and the PNG files to `folder`; returns the paths.

    Raises OSError if that fails.
    """
    from convnext_kernels.bench.numerics import BENCH_RULE
    from convnext_kernels.environment import rows as machine_rows

    folder.mkdir(parents=True, exist_ok=True)
    drawn, files = _draw(run, folder)
    groups = by(run, lambda record: record.group)
    order = [*groups, "forward", "training"]
    parts = by(run, lambda record: (record.group, record.direction, record.dtype))
    parts = dict(sorted(parts.items(), key=lambda part: [order.index(name) for name in part[0][:2]]))
    extra = [(name, flat(run.machine[name])) for name in ("commit", "clock_mhz") if name in run.machine]
    html = (
        charts.templates("convnext_kernels.bench")
        .get_template("bench.html.jinja")
        .render(
            run=run,
            name=machine_name(run),
            date=_date(run.created),
            duration=_duration(run.seconds),
            commit=run.machine.get("commit"),
            warnings=run.conditions.get("warnings", []),
            bad=[record for record in run.records if record.status in (WRONG, FAILED)],
            bad_checks=[check for check in run.checks if check.status in (WRONG, FAILED)],
            checks=check_rows(run),
            more=tables,
            error_share=error_share,
            cases=len(run.cases()),
            groups=[(g, s) for g, s in ((g, summarise(cases)) for g, cases in groups.items()) if s.cases],
            parts=[(*k, s) for k, s in ((k, summarise(cases)) for k, cases in parts.items()) if s.cases],
            losses=_losses(run),
            few=FEW,
            drawn=drawn,
            ratio_legend=charts.RATIO_LEGEND,
            model_legend=charts.MODEL_LEGEND,
            colours=charts.COLOURS,
            short=charts.short,
            number=number,
            speedup=speedup,
            tables=_tables(run),
            unavailable=Counter((r.candidate, r.reason) for r in run.records if r.status == UNAVAILABLE),
            rule=BENCH_RULE,
            ceilings=_ceilings(run),
            conditions=[(name, flat(value)) for name, value in run.conditions.items() if name != "warnings"],
            machine=[*machine_rows(run.machine), *extra],
            backends=run.machine["backends"],
        )
    )
    report = folder / NAME
    write_atomically(report, html)
    return [report, *files]


def write_if_possible(run: Run, folder: Path, tables: Sequence[object] = ()) -> str:
    """Write the report unless a package is missing; returns a sentence about the files in `folder`."""
    results = f"results: {folder / FILE}"
    if why_not := missing():
        return f"No {NAME}: {why_not}; {results}"
    write(run, folder, tables)
    return f"Report: {folder / NAME}, {results}"
