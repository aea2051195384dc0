"""The tables of a run for a terminal, and its HTML report."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convnext_kernels.bench import charts
from convnext_kernels.bench.numerics import BENCH_RULE
from convnext_kernels.bench.results import (
    EAGER,
    FAILED,
    FILE,
    OK,
    OURS,
    UNAVAILABLE,
    WRONG,
    Case,
    Record,
    Run,
    best_peer,
    is_ours,
    ratio,
)
from convnext_kernels.bench.tables import (
    Section,
    Table,
    date,
    machine,
    number,
    report_missing,
    short,
    speedup,
    write_page,
)

NAME = "report.html"
SHORT = {"torch.compile": "compile", "torch.compile, max-autotune": "autotune", "ONNX Runtime": "ORT"}  # in 80 columns
HOW = (
    "The candidates of a case are timed in rounds. In each round every candidate gets a short series of calls, one "
    "after the other: a slow phase of the machine hits all of them. One-time work (compiling, packing weights, "
    "converting the input's layout) is not timed. Medians are over all timed calls. ±: half the range of the medians "
    "of the rounds, over the median.",
    "FLOPs are 2 x the multiply-adds of convolutions and matmuls. Least bytes: inputs, outputs and parameters, each "
    'moved once. "of arithmetic": the time that the FLOPs need at the measured ceilings, over the measured time; '
    'depthwise convolutions are compared with the ceiling without matrix units. "of memory": the same for the least '
    "bytes, at the rate of the smallest memory level that holds them.",
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
    means = (statistics.geometric_mean(values) if values else None for values in (to_eager, to_peer))
    lost = (sum(value < 1 for value in values) for values in (to_eager, to_peer))
    return Summary(len(to_peer), *means, *lost)


def first(case: Case) -> Record:
    """One record of a case, for what all of them share."""
    return next(iter(case.values()))


def by(run: Run, key: Callable[[Record], object]) -> dict[object, list[Case]]:
    """Cases by `key` of one of their records, in the order they were measured."""
    found: dict[object, list[Case]] = {}
    for case in run.cases().values():
        found.setdefault(key(first(case)), []).append(case)
    return found


def machine_name(run: Run) -> str:
    """Name of the measured device: the GPU or the CPU."""
    found = run.machine.get("gpus") or []
    return str(found[0]).partition(",")[0] if run.device == "cuda" and found else run.machine["cpu"]["name"]


def error_share(found: Record) -> float | None:
    """Error over the allowed error, infinite for NaN, so that NaN counts as the largest; None without both."""
    if found.error is None or found.allowed_error is None:
        return None
    if not found.allowed_error:
        return 0.0 if found.error == 0 else math.inf
    share = found.error / found.allowed_error
    return math.inf if math.isnan(share) else share


def _shown(share: float | None) -> str:
    return "" if share is None else ">100" if share > 100 else f"{share:.2f}"


def _to(case: Case, other: Record | None) -> str:
    found = None if other is None else ratio(case, other.candidate)
    return "" if found is None else speedup(found.value)


def times(run: Run) -> list[Table]:
    """A table for each group and direction: eager, ours and the fastest peer."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for case in run.cases().values():
        record, eager, ours, peer = first(case), case.get(EAGER), case.get(OURS), best_peer(case)
        spreads = [r.times.spread for r in (eager, ours) if r is not None and r.times is not None]
        cells = ["" if r is None else number(r.times.median) if r.times else r.status for r in (eager, ours)]
        cells = ["-" if cell == UNAVAILABLE else cell for cell in cells]
        what = f"{record.what} b{record.batch} {record.dtype}"
        spread = f"{min(99, 100 * max(spreads)):.0f}%" if spreads else ""
        name = "" if peer is None else SHORT.get(peer.candidate, short(peer.candidate))
        key = f"{record.group}, {'forward + backward' if record.direction == 'training' else record.direction}"
        row = (what, *cells, spread, _to(case, eager), name, _to(case, peer))
        found.setdefault(f"{key}: milliseconds per call", []).append(row)
    columns = ("case", "eager", "ours", "±", "vs eager", "peer", "vs peer")
    return [Table(title, columns, rows) for title, rows in found.items()]


def models(run: Run) -> Table:
    """Images per second of whole models, those that are no ConvNeXt too."""
    rows = [
        (
            f"{r.what} b{r.batch} {r.dtype}",
            short(r.candidate),
            number(r.images_per_second),
            f"{r.flops / r.batch / 1e9:.2f}",
            "-" if r.parameters is None else f"{r.parameters / 1e6:.1f}",
        )
        for r in run.records
        if r.group in ("model", "rival") and r.direction == "forward" and r.times and r.candidate in (EAGER, OURS)
    ]
    return Table("models: images per second", ("model", "candidate", "images/s", "GFLOP", "M params"), rows)


def checks(run: Run) -> Table:
    """Checks of `verify` by op, backend and dtype: numbers of passed, failed and unsupported ones, largest error."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for check in run.checks:
        found.setdefault((check.group, check.candidate, check.dtype), []).append(check)
    rows = []
    for key, group in found.items():
        counts = Counter("bad" if check.status in (WRONG, FAILED) else check.status for check in group)
        worst = max((share for share in map(error_share, group) if share is not None), default=None)
        rows.append((*key, *(str(counts[name]) for name in (OK, "bad", UNAVAILABLE)), _shown(worst)))
    columns = ("op", "backend", "dtype", "passed", "failed", "unsupported", "largest error / allowed")
    return Table("Errors against fp64: forward, inference, gradients", columns, rows)


def complaints(run: Run) -> list[str]:
    """A line for each wrong or failed candidate, and for each failed check."""
    found = [(f"{r.case}, {r.candidate}", r) for r in run.records]
    found += [(f"{c.group} {c.what} {c.dtype} on {c.candidate}", c) for c in run.checks]
    return [f"{what}: {r.status}, not timed: {r.reason}" for what, r in found if r.status in (WRONG, FAILED)]


def absences(run: Run) -> list[str]:
    """A line for each reason why a candidate was unavailable, with the number of cases, and for what was not run."""
    counts = Counter(f"{r.candidate}: {r.reason}" for r in run.records if r.status == UNAVAILABLE)
    return [f"{line} ({count} case{'s' * (count > 1)})" for line, count in counts.items()] + run.not_run


def everything(run: Run, group: str) -> Table:
    """Every record of a group with times; columns without any value are left out."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.0f}%"

    rows = []
    for name, case in run.cases().items():
        for r in case.values() if first(case).group == group else ():
            if r.times is None:
                continue
            against = ratio(case, r.candidate) if r.candidate != OURS else None
            row = {
                "case": name,
                "candidate": r.candidate,
                "median ms": number(r.times.median),
                "min ms": number(r.times.minimum),
                "spread": f"±{100 * r.times.spread:.1f}%",
                "ours is": "" if against is None else speedup(against.value),
                "in rounds": "" if against is None else f"{against.low:.2f}-{against.high:.2f}",
                "error / allowed": _shown(error_share(r)),
                "GFLOP/s": number(r.gflops),
                "GB/s": number(r.gbytes),
                "of arithmetic": percent(r.compute_share),
                "of memory": percent(r.memory_share),
                "kept MiB": "" if r.saved_bytes is None else number(r.saved_bytes / 2**20),
                "launches": "" if r.launches is None else str(r.launches),
                "backend": r.backend or "",
            }
            rows.append(row)
    used = [column for column in rows[0] if any(row[column] for row in rows)] if rows else []
    return Table(group, tuple(used), [tuple(row[column] for column in used) for row in rows])


def _summary(run: Run) -> Table:
    rows = []
    for key, cases in by(run, lambda record: (record.group, record.direction, record.dtype)).items():
        found = summarise(cases)
        lost = (str(found.slower_than_eager), str(found.slower_than_peer))
        if found.cases:
            rows.append((*key, str(found.cases), speedup(found.to_eager), speedup(found.to_peer), *lost))
    columns = (
        "group",
        "direction",
        "dtype",
        "cases",
        "vs eager",
        "vs the best peer",
        "slower than eager",
        "than a peer",
    )
    return Table("", columns, rows, "Geometric means. The best peer is the fastest other candidate, eager included.")


def losses(run: Run) -> list[tuple[float, str, str]]:
    """(speed-up, case, peer) of every case in which a peer is faster than this package, largest loss first."""
    found = []
    for name, case in run.cases().items():
        peer = best_peer(case)
        against = ratio(case, peer.candidate) if peer is not None else None
        if against is not None and against.value < 1:
            found.append((against.value, name, peer.candidate))
    return sorted(found)


def _figures(run: Run) -> list[Section]:
    ratios, rates = [], []
    for (group, direction, dtype, batch), cases in by(run, lambda r: (r.group, r.direction, r.dtype, r.batch)).items():
        title = f"{group}, {dtype}, batch {batch}, {direction}"
        labels, peers = [first(case).what for case in cases], [best_peer(case) for case in cases]
        if group in ("model", "rival"):
            by_name = {
                "eager": [case.get(EAGER) for case in cases],
                "best peer": peers,
                "accelerated": [case.get(OURS) for case in cases],
            }
            values = {name: [r and r.images_per_second for r in found] for name, found in by_name.items()}
            rates.append((title, charts.bars("images/s", labels, values)))
        if group not in ("rival", "scaling") and summarise(cases).cases:
            found = {
                "eager": [ratio(case) for case in cases],
                "best peer": [peer and ratio(case, peer.candidate) for case, peer in zip(cases, peers, strict=True)],
            }
            values = {name: [each and each.value for each in all_] for name, all_ in found.items()}
            ratios.append((title, charts.bars("ours compared with", labels, values, speedup, ratios=True)))
    return [
        Section("Speed-up of every case", [ratios] if ratios else []),
        Section("Models", [rates, models(run)] if rates else []),
        Section("Cost by batch size and image size", [found] if (found := charts.scaling(run)) else []),
    ]


def flat(value: object) -> str:
    """Format plain values of a result file as one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {flat(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(flat, value))
    return number(value) if isinstance(value, float) else "none" if value in (None, "") else str(value)


def _ceilings(run: Run) -> Table:
    sources = run.ceilings.get("sources", {})
    rows = [
        (f"{name} products", f"{number(rate / 1e9)} GFLOP/s", sources.get(name, ""))
        for name, rate in run.ceilings.get("flops", {}).items()
    ]
    for level in run.ceilings.get("memory", []):
        size = "" if level["size"] is None else f", working sets up to {number(level['size'] / 2**20)} MiB"
        rows.append((level["level"] + size, f"{number(level['rate'] / 1e9)} GB/s", sources.get("memory", "")))
    return Table("Measured ceilings", ("what", "rate", "source"), rows)


def write(run: Run, folder: Path, tables: Sequence[Table] = ()) -> Path:
    """Write ``report.html``, with further `tables`, to `folder`; returns its path. OSError if that fails."""
    conditions = [(name, flat(value)) for name, value in run.conditions.items() if name != "warnings"]
    conditions += [(name, flat(run.machine[name])) for name in ("commit", "clock_mhz") if name in run.machine]
    state = "complete" if run.complete else "interrupted: not everything was measured"
    summary, lost = _summary(run), losses(run)
    none = "No case is slower than the best peer." if run.records else "This run has no records."
    slower = Table(
        "Cases slower than the best peer",
        ("case", "best peer", "ours is"),
        [(name, peer, speedup(value)) for value, name, peer in lost],
    )
    sections = [
        Section(
            "Speed-up of convnext_kernels", [summary if summary.rows else "No case has times of ours and of a peer."]
        ),
        Section("Losses", [slower if lost else none]),
        *_figures(run),
        Section("All results", [everything(run, group) for group in by(run, lambda record: record.group)]),
        Section("Not measured", absences(run)),
        *(Section(table.title, [table._replace(title="")]) for table in (*tables, checks(run)) if table.rows),
        Section("How it was measured", [*HOW, BENCH_RULE, _ceilings(run), Table("Conditions", ("", ""), conditions)]),
        Section("Machine", machine(run.machine)),
    ]
    about = f"device {run.device}, mode {run.mode}, {date(run.created)}, {run.seconds / 60:.0f} minutes, {state}"
    warnings = run.conditions.get("warnings", [])
    write_page(folder / NAME, f"Benchmark: {machine_name(run)}", about, sections, warnings, complaints(run))
    return folder / NAME


def write_if_possible(run: Run, folder: Path, tables: Sequence[Table] = ()) -> str:
    """Write the report unless a package is missing; returns a sentence about the files in `folder`."""
    results = f"results: {folder / FILE}"
    if why_not := report_missing():
        return f"No {NAME}: {why_not}; {results}"
    return f"Report: {write(run, folder, tables)}, {results}"


def candidates(run: Run, groups: Sequence[str], title: str, minima: bool = False) -> Table:
    """Milliseconds of every candidate, and how the fastest of ours compares with eager and with the fastest peer."""
    cases = [case for case in run.cases().values() if first(case).group in groups]
    names = list(dict.fromkeys(r.candidate for case in cases for r in case.values() if r.times is not None))

    def milliseconds(record: Record | None) -> str:
        if record is None or record.times is None:
            return "-" if record is None else record.status
        return number(record.times.median) + (f" ({number(record.times.minimum)})" if minima else "")

    rows = []
    for case in cases:
        timed = [r for r in case.values() if is_ours(r.candidate) and r.times is not None]
        case_of_fastest = case | ({OURS: min(timed, key=lambda r: r.times.median)} if timed else {})
        compared = []
        for other in (case.get(EAGER), best_peer(case)):
            found = None if other is None else ratio(case_of_fastest, other.candidate)
            compared.append("-" if found is None else speedup(found.value, other.candidate))
        r = first(case)
        times = (milliseconds(case.get(name)) for name in names)
        rows.append((f"{r.what} {r.dtype}, batch {r.batch}, {r.direction}", *times, *compared))
    return Table(title, ("ms", *names, "fastest of ours compared with eager", "with the fastest peer"), rows)
