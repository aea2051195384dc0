"""Write the performance tables of README.md from the runs of record in benchmarks/results.

    python benchmarks/update_readme.py [--check]

For each device and machine the newest complete run counts. Nothing between the markers is typed by hand; --check
fails where README.md is not what this script would write.
"""

import argparse
import datetime
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from convnext_kernels.bench.charts import number, short
from convnext_kernels.bench.report import Case, by, machine_name, summarise
from convnext_kernels.bench.results import EAGER, FAILED, OURS, WRONG, Record, Run, best_peer, load, ratio

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin (python benchmarks/update_readme.py) -->"
END = "<!-- results: end -->"
COLUMNS = 4  # of a table, at the most: README is read in a narrow column
OPS = ("dwconv", "layernorm", "mlp")
LEGEND = (
    "Cells: eager / convnext_kernels in ms, medians; **times faster than eager**; then, where another peer is faster "
    "than eager, the fastest one and times faster than it. Below 1x is slower. Everything is checked against fp64 "
    "before it gets a time."
)


def runs_of_record(folder: Path) -> list[Run]:
    """The newest complete run of each device and machine; of two of one moment, the one whose file name is last."""
    newest: dict[tuple[object, ...], tuple[datetime.datetime, Run]] = {}
    for file in sorted(folder.glob("*.json")):
        run = load(file)
        if not run.complete:
            continue
        created = datetime.datetime.fromisoformat(run.created)
        key = (run.device, machine_name(run), run.machine["threads"]["cores"] if run.device == "cpu" else None)
        if key not in newest or created >= newest[key][0]:
            newest[key] = (created, run)
    return [newest[key][1] for key in sorted(newest, key=str)]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)


def _first(case: Case) -> Record:
    return next(iter(case.values()))


def _times(case: Case) -> str:
    """One cell of the tables of blocks."""
    ours, eager, peer = case.get(OURS), case.get(EAGER), best_peer(case)
    if ours is None:
        return "-"
    if ours.times is None:
        return ours.status
    left = "-" if eager is None or eager.times is None else number(eager.times.median)
    parts = [f"{left} / {number(ours.times.median)}"]
    against = ratio(case)
    if against is not None:
        parts.append(f"**{against.value:.2f}x**")
    if peer is not None and peer.candidate != EAGER:
        parts.append(f"{short(peer.candidate)} {ratio(case, peer.candidate).value:.2f}x")
    return ", ".join(parts)


def _training(case: Case) -> str:
    kept = [record.saved_bytes for record in (case.get(EAGER), case.get(OURS)) if record is not None]
    if len(kept) < 2 or None in kept:
        return _times(case)
    return f"{_times(case)}; {number(kept[0] / 2**20)} / {number(kept[1] / 2**20)} MiB"


def _rates(case: Case) -> str:
    """One cell of the table of models: images/s."""
    eager, ours, peer = case.get(EAGER), case.get(OURS), best_peer(case)
    if peer is None and (ours is None or ours.times is None):
        return "-"
    parts = ["-" if eager is None or eager.times is None else number(eager.images_per_second)]
    other = peer is not None and peer.candidate != EAGER
    parts.append(f"{number(peer.images_per_second)} {short(peer.candidate)}" if other else "-")
    if ours is not None:
        parts.append(ours.status if ours.times is None else f"**{number(ours.images_per_second)}**")
    return " / ".join(parts)


def _table(
    cases: list[Case],
    row: Callable[[Record], str],
    column: Callable[[Record], str],
    cell: Callable[[Case], str],
    head: str,
    fixed: dict[str, Callable[[list[Record]], str]] | None = None,
) -> list[str]:
    """Markdown: a line for each `row`, and `fixed` columns before those of `column`; several tables if it is wide."""
    fixed = fixed or {}
    cells = {(row(_first(case)), column(_first(case))): cell(case) for case in cases}
    records: dict[str, list[Record]] = {}
    for case in cases:
        records.setdefault(row(_first(case)), []).extend(case.values())
    columns = list(dict.fromkeys(column(_first(case)) for case in cases))
    lines = []
    for start in range(0, len(columns), COLUMNS):
        part = columns[start : start + COLUMNS]
        titles = [head, *fixed, *part]
        lines += ["", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
        for name, found in records.items():
            made = [cells.get((name, title), "-") for title in part]
            if any(text != "-" for text in made):
                lines.append(f"| {' | '.join([name, *(make(found) for make in fixed.values()), *made])} |")
    return lines


def _sentence(name: str, cases: list[Case]) -> str:
    found = summarise(cases)
    if not found.cases:
        return ""
    eager = "" if found.to_eager is None else f"{found.to_eager:.2f}x against eager and "
    return (
        f"{name}: {eager}{found.to_peer:.2f}x against the best peer, slower than eager in "
        f"{found.slower_than_eager} and than the best peer in {found.slower_than_peer} of {found.cases} cases"
    )


def _ops(parts: dict[tuple[str, str], list[Case]]) -> list[str]:
    """A paragraph on the single ops."""
    names = [(group, direction) for group in OPS for direction in ("forward", "training")]
    found = [_sentence(f"{group}, {direction}", parts.get((group, direction), [])) for group, direction in names]
    found = [sentence for sentence in found if sentence]
    return ["", *_paragraph(f"Single ops, geometric means. {'; '.join(found)}.")] if found else []


def _heading(run: Run) -> list[str]:
    """Where, how and when."""
    flags = {"quick": " --quick", "full": " --full"}.get(run.mode, "")
    device = " --device cuda" if run.device == "cuda" else ""
    cores, threads = run.machine["threads"]["cores"], run.conditions.get("threads")
    where = f"{cores} cores, {threads} threads, " if run.device == "cpu" else ""
    commit = run.machine.get("commit")
    lines = [
        f"### {machine_name(run)}",
        "",
        *_paragraph(
            f"{where}PyTorch {run.machine['libraries']['torch']}, mode {run.mode}, {run.created[:10]}, "
            f"{f'commit {commit}, ' if commit else ''}`convnext-kernels bench{flags}{device}`."
        ),
    ]
    for line in run.conditions.get("warnings", []):
        lines += _paragraph(f"Beware: {line}.")
    bad = sum(record.status in (WRONG, FAILED) for record in run.records)
    if bad:
        lines.append(f"Wrong or failed, and therefore without a speed: {bad} of {len(run.records)} results.")
    return lines


def render(run: Run) -> list[str]:
    """The lines of one run."""
    parts = by(run, lambda record: (record.group, record.direction))

    def dtype_and_batch(record: Record) -> str:
        return f"{record.dtype} batch {record.batch}"

    lines = _heading(run)
    blocks = parts.get(("block", "forward"), [])
    blocks = sorted(blocks, key=lambda case: _first(case).what.split(" ")[0])  # V1, then V2; stages stay in order
    if blocks:
        lines += _table(blocks, lambda record: record.what, dtype_and_batch, _times, "block")
    training = parts.get(("block", "training"), []) + parts.get(("model", "training"), [])
    if training:
        lines += ["", "Training, forward and backward; then what is kept for the backward pass, eager / ours:"]
        lines += _table(
            training, lambda record: f"{record.what}, batch {record.batch}", lambda r: r.dtype, _training, "training"
        )
    models = parts.get(("model", "forward"), []) + parts.get(("rival", "forward"), [])
    if models:
        fixed = {
            "GFLOP": lambda records: number(max(r.flops / r.batch for r in records) / 1e9),
            "M params": lambda records: number(max(r.parameters or 0 for r in records) / 1e6),
        }
        lines += ["", 'Models, images/s: eager / best other peer ("-": none is faster) / **accelerated**:']
        lines += _table(models, lambda record: record.what, dtype_and_batch, _rates, "model", fixed)
    return lines + _ops(parts)


def updated(readme: str, runs: list[Run]) -> str:
    """`readme` with what belongs between the markers; ValueError without exactly one pair of them."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected one {BEGIN} and, after it, one {END}")
    lines = _paragraph(LEGEND) if runs else ["No run of record yet."]
    for run in runs:
        lines += ["", *render(run)]
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    """Update README, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README is not up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args(arguments)
    try:
        text = chosen.readme.read_text(encoding="utf-8")
        wanted = updated(text, runs_of_record(chosen.results))
    except (OSError, ValueError) as error:
        print(f"update_readme: {chosen.readme}: {error}", file=sys.stderr)
        return 1
    if wanted == text:
        return 0
    if chosen.check:
        print(
            f"update_readme: {chosen.readme} is not up to date: run python benchmarks/update_readme.py", file=sys.stderr
        )
        return 1
    chosen.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
