"""The results as tables in a terminal, 80 columns wide."""

from typing import TYPE_CHECKING

from convnext_kernels.bench.charts import number
from convnext_kernels.bench.report import check_rows
from convnext_kernels.bench.results import EAGER, FAILED, OURS, UNAVAILABLE, WRONG, Ratio, Record, Run, best_peer, ratio

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SHORT = {  # names of candidates that leave room for the figures in 80 columns
    EAGER: "eager",
    "eager, contiguous": "NCHW",
    "torch.compile": "compile",
    "torch.compile, max-autotune": "autotune",
    "OpenVINO": "OpenVINO",
    "ONNX Runtime": "ORT",
}
COMPLAINTS = {WRONG: "refused, wrong numbers", FAILED: "failed"}


def _time(record: Record | None) -> str:
    if record is None:
        return ""
    if record.times is None:
        return record.status
    return f"{number(record.times.median)} ±{min(99, 100 * record.times.spread):.0f}%"


def _ratio(value: Ratio | None) -> "Text":
    from rich.text import Text

    if value is None:
        return Text("")
    return Text(f"{value.value:.2f}x", "green" if value.value > 1 else "red")


def _case(record: Record) -> str:
    return f"{record.what} b{record.batch} {record.dtype}"


def _table(group: str, direction: str) -> "Table":
    from rich import box
    from rich.table import Table

    title = f"{group}, {'forward + backward' if direction == 'training' else direction}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("case", no_wrap=True)
    for column in ("eager ms", "ours ms", "ratio", "peer", "ratio", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _rivals(rows: list[Record]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title="models, images/s", box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for column in ("candidate", "images/s", "GFLOP", "M param."):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        cells = (f"{r.images_per_second:.1f}", f"{r.flops / r.batch / 1e9:.2f}", f"{r.parameters / 1e6:.1f}")
        table.add_row(_case(r), SHORT.get(r.candidate, "ours"), *cells)
    return table


def tables(run: Run) -> "list[Table]":
    """A table for each group and direction, then one of whole models in images/s."""
    from rich.text import Text

    found: dict[tuple[str, str], Table] = {}
    models = []
    for case in run.cases().values():
        first = next(iter(case.values()))
        if first.group in ("model", "rival") and first.direction == "forward":
            models += [r for r in case.values() if r.times and r.candidate in (EAGER, OURS)]
        if first.group == "rival":
            continue
        table = found.setdefault((first.group, first.direction), _table(first.group, first.direction))
        ours, best = case.get(OURS), best_peer(case)
        error = Text("")
        if ours is not None and ours.error is not None:
            share = ours.error / ours.allowed_error
            error = Text(f"{share:.2f}" if share < 10 else ">10", "" if share <= 1 else "red")
        table.add_row(
            _case(first),
            _time(case.get(EAGER)),
            _time(ours),
            _ratio(ratio(case)),
            "" if best is None else SHORT.get(best.candidate, best.candidate),
            _ratio(None if best is None else ratio(case, best.candidate)),
            error,
        )
    return [*found.values(), *([_rivals(models)] if models else [])]


def numerics(run: Run) -> "Table":
    """Checks of `verify` by op, backend and dtype: how many, and the largest error over the allowed one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="numerics against fp64: forward, inference, gradients", box=box.SIMPLE, pad_edge=False)
    for column in ("op", "backend", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("passed", "bad", "refused", "worst error"):
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
    """A line for each reason why a candidate could not take part, with the number of cases."""
    counts: dict[str, int] = {}
    for r in run.records:
        if r.status == UNAVAILABLE:
            line = f"{r.candidate}: {r.reason}"
            counts[line] = counts.get(line, 0) + 1
    return [f"{line} ({count} case{'s' * (count > 1)})" for line, count in counts.items()]


LEGEND = (
    "ms: median of all calls, ± half the range of the medians of single rounds (99: or more). ratio: how many times "
    "faster ours is. peer: the fastest of the others. error: ours against fp64, over the allowed one."
)
