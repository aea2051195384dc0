"""The tables of a run, for a terminal and in Markdown."""

import math
from collections import Counter
from collections.abc import Callable, Iterable

from convnext_kernels.bench import ceilings
from convnext_kernels.bench.results import (
    EAGER,
    FAILED,
    OK,
    OURS,
    UNAVAILABLE,
    WRONG,
    Case,
    Record,
    Run,
    best_peer,
    ratio,
)
from convnext_kernels.bench.tables import Table, date, number, short, speedup

SHORT = {"torch.compile": "compile", "torch.compile, max-autotune": "autotune", "ONNX Runtime": "ORT"}  # in 80 columns
LEGEND = (
    "Times are medians. ±: the larger spread of eager and ours, which is half the range of the medians of the rounds "
    "(99%: or more). peer: the fastest other candidate. Only candidates with right results are timed."
)


def machine_name(run: Run) -> str:
    """Name of the measured device: the GPU or the CPU."""
    found = run.machine.get("gpus") or []
    return str(found[0]).partition(",")[0] if run.device == "cuda" and found else run.machine["cpu"]["name"]


def error_share(records: Iterable[Record]) -> float | None:
    """The largest error over the allowed one, infinite for NaN; None without any."""
    shares = [r.error / r.allowed_error for r in records if r.error is not None and r.allowed_error]
    return max((math.inf if math.isnan(share) else share for share in shares), default=None)


def _shown(share: float | None) -> str:
    return "" if share is None else ">100" if share > 100 else f"{share:.2f}"


def times(run: Run) -> list[Table]:
    """A table for each group and direction: eager, ours and the fastest peer."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for case in run.cases().values():
        record, peer = next(iter(case.values())), best_peer(case)
        both = [case[name] for name in (EAGER, OURS) if name in case]
        cells = {r.candidate: number(r.times.median) if r.times else r.status.replace(UNAVAILABLE, "-") for r in both}
        spread = max((r.times.spread for r in both if r.times), default=None)
        name = SHORT.get(peer, short(peer or ""))
        if peer and OURS not in case:  # then nothing else tells how fast it is
            name += f" {number(case[peer].times.median)}"
        versus = ["" if (value := ratio(case, to)) is None else speedup(value) for to in (EAGER, peer)]
        row = (
            f"{record.what} b{record.batch} {record.dtype}",
            *(cells.get(name, "") for name in (EAGER, OURS)),
            "" if spread is None else f"{min(99, 100 * spread):.0f}%",
            versus[0],
            name,
            versus[1],
        )
        key = f"{record.group}, {'forward + backward' if record.direction == 'training' else record.direction}"
        found.setdefault(f"{key}: milliseconds per call", []).append(row)
    columns, last = ("case", "eager", "ours", "±", "vs eager", "peer", "vs peer"), next(reversed(found), None)
    return [Table(title, columns, rows, LEGEND if title == last else "") for title, rows in found.items()]


def everything(run: Run) -> list[Table]:
    """Every record with times, a table for each group; columns without any value are left out."""
    found: dict[str, list[dict[str, str]]] = {}
    for case in run.cases().values():
        for r in filter(lambda record: record.times, case.values()):
            compute, memory = ceilings.shares(r, run.ceilings)
            cells = {
                "case": r.case,
                "candidate": r.candidate,
                "median ms": number(r.times.median),
                "min ms": number(r.times.minimum),
                "spread": f"±{100 * r.times.spread:.1f}%",
                "ours is": "" if r.candidate == OURS else speedup(ratio(case, r.candidate)).strip("-"),
                "error / allowed": _shown(error_share([r])),
                "GFLOP/s": number(r.flops / r.times.median / 1e6),
                "GB/s": number(r.bytes / r.times.median / 1e6),
                "of arithmetic": "" if compute is None else f"{compute:.0%}",
                "of memory": "" if memory is None else f"{memory:.0%}",
                "kept MiB": "" if r.saved_bytes is None else number(r.saved_bytes / 2**20),
            }
            found.setdefault(r.group, []).append(cells)
    tables = []
    for group, rows in found.items():
        used = [column for column in rows[0] if any(row[column] for row in rows)]
        tables.append(Table(group, tuple(used), [tuple(row[column] for column in used) for row in rows]))
    return tables


def checks(run: Run) -> Table:
    """Checks of `verify` by op, backend and dtype: numbers of passed, failed and unsupported ones, largest error."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for check in run.checks:
        found.setdefault((check.group, check.candidate, check.dtype), []).append(check)
    rows = []
    for key, group in found.items():
        counts = Counter("bad" if check.status in (WRONG, FAILED) else check.status for check in group)
        rows.append((*key, *(str(counts[name]) for name in (OK, "bad", UNAVAILABLE)), _shown(error_share(group))))
    columns = ("op", "backend", "dtype", "passed", "failed", "unsupported", "largest error / allowed")
    return Table("Errors against fp64: forward, inference, gradients", columns, rows)


def complaints(run: Run) -> list[str]:
    """A line for each wrong or failed candidate, and for each failed check."""
    bad = (r for r in (*run.records, *run.checks) if r.status in (WRONG, FAILED))
    return [f"{r.case}, {r.candidate}: {r.status}, not timed: {r.reason}" for r in bad]


def absences(run: Run) -> list[str]:
    """A line for each reason why a candidate was unavailable, with the number of cases, and for what was not run."""
    counts = Counter(f"{r.candidate}: {r.reason}" for r in run.records if r.status == UNAVAILABLE)
    return [f"{line} ({count} case{'s' * (count > 1)})" for line, count in counts.items()] + run.not_run


def speedups(cases: Iterable[Case], to: Callable[[Case], str | None]) -> list[float]:
    """The known speed-ups over the candidate `to` of each case."""
    return [value for case in cases if (value := ratio(case, to(case))) is not None]


def losses(run: Run) -> list[tuple[float, str, str]]:
    """(speed-up, case, peer) of every case in which a peer is faster than this package, largest loss first."""
    found = [(ratio(case, best_peer(case)), name, best_peer(case)) for name, case in run.cases().items()]
    return sorted(loss for loss in found if loss[0] is not None and loss[0] < 1)


def measured_ceilings(run: Run) -> Table:
    """The file has the sizes of the memory levels."""
    rows = [(f"{name} products", f"{number(r / 1e9)} GFLOP/s") for name, r in run.ceilings.get("flops", {}).items()]
    rows += [(level["level"], f"{number(level['rate'] / 1e9)} GB/s") for level in run.ceilings.get("memory", [])]
    return Table("Measured ceilings", ("what", "rate"), rows)


def details(run: Run) -> list[Table]:
    """Everything that was measured, below what `times` shows."""
    return [table for table in (*everything(run), checks(run), measured_ceilings(run)) if table.rows]


def heading(run: Run) -> str:
    """On what and when `run` was measured."""
    where = f"device {run.device}, mode {run.mode}, commit {run.machine.get('commit')}"
    state = "complete" if run.complete else "interrupted: not everything was measured"
    return f"## {machine_name(run)}\n\n{where}, {date(run.created)}, {run.seconds / 60:.0f} minutes, {state}"
