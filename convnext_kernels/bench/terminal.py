"""The results as tables in a terminal, 80 columns wide."""

from typing import TYPE_CHECKING

from convnext_kernels.bench.charts import number, speedup
from convnext_kernels.bench.report import check_rows
from convnext_kernels.bench.results import EAGER, FAILED, OURS, UNAVAILABLE, WRONG, Ratio, Record, Run, best_peer, ratio

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SHORT = {  # names of candidates that fit into 80 columns
    EAGER: "eager",
    "eager, contiguous": "NCHW",
    "torch.compile": "compile",
    "torch.compile, max-autotune": "autotune",
    "OpenVINO": "OpenVINO",
    "ONNX Runtime": "ORT",
}
COMPLAINTS = {WRONG: "wrong results, not timed", FAILED: "failed"}


def _time(record: Record | None) -> str:
    if record is None:
        return ""
    if record.times is None:
        return "-" if record.status == UNAVAILABLE else record.status
    return number(record.times.median)


def _speedup(value: Ratio | None) -> "Text":
    from rich.text import Text

    if value is None:
        return Text("")
    return Text(speedup(value.value), "green" if value.value > 1 else "red")


def _case(record: Record) -> str:
    return f"{record.what} b{record.batch} {record.dtype}"


def _empty(title: str, first: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=0)  # one space between columns
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _times_table(group: str, direction: str) -> "Table":
    title = f"{group}, {'forward + backward' if direction == 'training' else direction}: milliseconds per call"
    return _empty(title, "case", "eager", "ours", "±", "vs eager", "peer", "vs peer")


def _models_table(rows: list[Record]) -> "Table":
    table = _empty("models: images per second", "model", "candidate", "images/s", "GFLOP", "M params")
    for r in rows:
        cells = (f"{r.images_per_second:.1f}", f"{r.flops / r.batch / 1e9:.2f}", f"{r.parameters / 1e6:.1f}")
        table.add_row(_case(r), SHORT.get(r.candidate, "ours"), *cells)
    return table


def tables(run: Run) -> "list[Table]":
    """A table for each group and direction, then one of whole models in images/s."""
    found: dict[tuple[str, str], Table] = {}
    models = []
    for case in run.cases().values():
        first = next(iter(case.values()))
        if first.group in ("model", "rival") and first.direction == "forward":
            models += [r for r in case.values() if r.times and r.candidate in (EAGER, OURS)]
        if first.group == "rival":
            continue
        table = found.setdefault((first.group, first.direction), _times_table(first.group, first.direction))
        eager, ours, best = case.get(EAGER), case.get(OURS), best_peer(case)
        spreads = [r.times.spread for r in (eager, ours) if r is not None and r.times is not None]
        table.add_row(
            _case(first),
            _time(eager),
            _time(ours),
            f"{min(99, 100 * max(spreads)):.0f}%" if spreads else "",
            _speedup(ratio(case)),
            "" if best is None else SHORT.get(best.candidate, best.candidate),
            _speedup(None if best is None else ratio(case, best.candidate)),
        )
    return [*found.values(), *([_models_table(models)] if models else [])]


NUMERICS = ("op", "backend", "dtype", "passed", "failed", "unsupported", "error/allowed")  # columns of `check_rows`


def numerics(run: Run) -> "Table":
    """Checks of `verify` by op, backend and dtype: how many, and the largest error over the allowed one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = "errors against fp64: forward, inference, gradients"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for column in NUMERICS[:3]:
        table.add_column(column, no_wrap=True)
    for column in NUMERICS[3:]:
        table.add_column(column, justify="right", no_wrap=True)
    for *key, passed, bad, refused, worst in check_rows(run):
        table.add_row(*key, *(Text(n, "" if bad == "0" else "red") for n in (passed, bad, refused)), worst)
    return table


def complaints(run: Run) -> list[str]:
    """A line for each wrong or failed candidate."""
    return [
        f"{r.case}, {r.candidate}: {COMPLAINTS[r.status]}: {r.reason}" for r in run.records if r.status in COMPLAINTS
    ]


def absences(run: Run) -> list[str]:
    """A line for each reason why a candidate was unavailable, with the number of cases."""
    counts: dict[str, int] = {}
    for r in run.records:
        if r.status == UNAVAILABLE:
            line = f"{r.candidate}: {r.reason}"
            counts[line] = counts.get(line, 0) + 1
    return [f"{line} ({count} case{'s' * (count > 1)})" for line, count in counts.items()]


def largest_error(run: Run) -> str:
    """The largest error of this package among its right results, as a sentence; "" without any."""
    shares = [r.error / r.allowed_error for r in run.records if r.candidate == OURS and r.times and r.allowed_error]
    return f"The largest error of ours is {max(shares):.0%} of the allowed one." if shares else ""


LEGEND = (
    "Times are medians. ±: the larger spread of eager and ours, which is half the range of the medians of the rounds "
    "(99%: or more). peer: the fastest other candidate. Only candidates with right results are timed."
)
