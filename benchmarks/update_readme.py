"""Write the measured figures of README.md and of the pages in docs from the records in benchmarks/results.

    python benchmarks/update_readme.py [--check]

README.md and docs/index.md get a chart (docs/images/speedup-{light,dark}.svg), README.md also a short table of the
newest undisturbed record (one without warnings); docs/benchmarks.md gets every case of every record; the page of an op
in docs/ops its cases of that record, and what the proofs have counted of it. Nothing between the markers is typed by
hand. --check writes nothing and fails where a file is out of date.
"""

import argparse
import datetime
import io
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from convnext_kernels.bench import report
from convnext_kernels.bench.report import by, first, machine_name, speedups
from convnext_kernels.bench.results import EAGER, FAILED, OURS, WRONG, Case, Run, best_peer, load, ratio
from convnext_kernels.bench.tables import Table, number

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin (python benchmarks/update_readme.py) -->"
END = "<!-- results: end -->"
DTYPES = ("fp32", "bf16")
NAMES = {"eager, contiguous": "eager, NCHW", "torch.compile, max-autotune": "torch.compile (max-autotune)"}
# The rows of README's table and, of whole models, of its chart: name, then the case without its dtype.
ROWS = (
    ("ConvNeXt-T, batch 1", "model/ConvNeXt-T-224-b1-{}-forward"),
    ("ConvNeXt-T, batch 8", "model/ConvNeXt-T-224-b8-{}-forward"),
    ("ConvNeXt-B, batch 1", "model/ConvNeXt-B-224-b1-{}-forward"),
    ("ConvNeXt V2-T, batch 1", "model/ConvNeXt-V2-T-224-b1-{}-forward"),
    ("ConvNeXt-T, training, batch 2", "model/ConvNeXt-T-224-b2-{}-training"),
    ("block, 96 channels, 56x56, batch 8", "block/V1-C96-56x56-b8-{}-forward"),
    ("block, 768 channels, 7x7, batch 8", "block/V1-C768-7x7-b8-{}-forward"),
)
TITLES = {
    ("model", "forward"): "Whole models, inference",
    ("model", "training"): "Whole models, training (forward and backward)",
    ("rival", "forward"): "Other models, for comparison",
    ("block", "forward"): "Blocks, inference",
    ("block", "training"): "Blocks, training (forward and backward)",
}
# The rows of a record of the same machine with an older instruction set (CONVNEXT_KERNELS_CPU_ISA).
LIMITED_ROWS = (ROWS[0], ROWS[5])
OPS = ("dwconv", "layernorm", "mlp")
# What the pages of ops show of the newest record, beside "No record yet.": starts of the cases' names.
SHOWN = {"dwconv": "K7 ", "layernorm": "", "mlp": ""}
COUNTED = (  # by which program on a CPU: the backend, the file with its figures, the command
    ("Triton", "proofs/records/triton_counts.md", "python proofs/triton_executed.py --update"),
    ("CUDA C++", "proofs/records/cuda_counts.md", "python proofs/cuda_executed.py --update"),
)
SUMMARISED = [(group, direction) for group in OPS for direction in ("forward", "training")]


def records(folder: Path) -> list[Run]:
    """The newest complete run of each device and machine; of two of one moment, the one whose file name is last.

    First those that nothing disturbed, last those of an older instruction set.
    """
    found = [run for file in sorted(folder.glob("*.json"), reverse=True) if (run := load(file)).complete]
    newest: dict[tuple[object, ...], Run] = {}
    for run in sorted(found, key=lambda run: datetime.datetime.fromisoformat(run.created), reverse=True):
        newest.setdefault((run.device, machine_name(run), run.machine["threads"]["cores"], limit(run)), run)
    return sorted(newest.values(), key=lambda run: (limit(run) is not None, bool(run.conditions.get("warnings"))))


def limit(run: Run) -> str | None:
    """The instruction set that the CPU was limited to."""
    return run.machine.get("environment", {}).get("CONVNEXT_KERNELS_CPU_ISA") if run.device == "cpu" else None


def title(run: Run) -> str:
    """The machine, and what it was limited to."""
    return machine_name(run) + ("" if limit(run) is None else f", limited to {limit(run)}")


def paragraph(text: str) -> list[str]:
    """`text` in lines of README's width."""
    return textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["", *Table("", tuple(titles), [tuple(row) for row in rows]).markdown().splitlines()]


def named(candidate: str) -> str:
    """A candidate as the reader knows it."""
    return NAMES.get(candidate, candidate)


def compared(case: Case, to: str | None) -> str:
    """How ours compares, as "1.30 times faster than OpenVINO"; "-" without both times."""
    if (value := ratio(case, to)) is None:
        return "-"
    return f"{max(value, 1 / value):.2f} times {'faster' if value >= 1 else 'slower'} than {named(to)}"


def other_peer(case: Case) -> str | None:
    """The fastest peer beside eager, which has a column of its own."""
    return best_peer({name: record for name, record in case.items() if name != EAGER})


def machine(run: Run) -> str:
    """On what, when and by which command `run` was measured."""
    flags = {"quick": " --quick", "full": " --full"}.get(run.mode, "")
    device = " --device cuda" if run.device == "cuda" else ""
    cores, threads = run.machine["threads"]["cores"], run.conditions.get("threads")
    where = f", {cores} cores, {threads} threads" if run.device == "cpu" else ""
    commit = f", commit {run.machine['commit']}" if run.machine.get("commit") else ""
    command = "verify" if run.mode == "verify" else f"bench{flags}{device}"
    return (
        f"{title(run)}{where}, PyTorch {run.machine['libraries']['torch']}, {run.created[:10]}{commit}: "
        f"`convnext-kernels {command}`"
        + ("" if limit(run) is None else " with the variables of [AVX2](cpu_kernels.md#avx2)")
    )


class Bar(NamedTuple):
    """One row of README's chart: how many times faster than eager."""

    what: str
    dtype: str
    ours: float
    peer: float | None  # of the fastest other peer
    peer_name: str


def bars(run: Run) -> list[Bar]:
    """The whole models of `ROWS`."""
    found, cases = [], run.cases()
    for dtype in DTYPES:
        for what, name in ROWS:
            case = cases.get(name.format(dtype), {})
            ours, other = ratio(case), other_peer(case)
            if name.startswith("model/") and ours is not None:
                peer = None if other is None else case[EAGER].times.median / case[other].times.median
                found.append(Bar(what, dtype, ours, peer, named(other or "")))
    return found


def description(run: Run) -> str:
    """What the chart shows, in words: the text for those who cannot see it, and what --check reads."""
    rows = "; ".join(
        f"{bar.what}, {bar.dtype}: convnext_kernels {bar.ours:.2f}"
        + ("" if bar.peer is None else f", {bar.peer_name} {bar.peer:.2f}")
        for bar in bars(run)
    )
    return f"Times faster than eager PyTorch on {machine_name(run)}. {rows}."


def draw(run: Run, file: Path, dark: bool) -> None:
    """Draw README's chart: for each model and dtype, this package and the fastest other peer beside eager."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, grid, ours, other = (
        ("#e6edf3", "#3d444d", "#ff7b54", "#6e8fb5") if dark else ("#1f2328", "#d1d9e0", "#d9431e", "#5b7ba3")
    )
    rows = bars(run)
    style = {"svg.fonttype": "none", "svg.hashsalt": "convnext_kernels", "font.family": "sans-serif", "font.size": 11}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with rc_context(style):
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        panels = figure.subplots(len(DTYPES), 1, sharex=True)
        for axes, dtype in zip(panels, DTYPES, strict=True):
            shown = [bar for bar in rows if bar.dtype == dtype]
            places = range(len(shown))
            labels = ["" if bar.peer is None else f"{bar.peer:.2f} {bar.peer_name}" for bar in shown]
            peers = axes.barh([p + 0.2 for p in places], [bar.peer or 0 for bar in shown], 0.36, color=other)
            axes.bar_label(peers, labels, padding=6, color=ink, fontsize=9)
            found = axes.barh([p - 0.2 for p in places], [bar.ours for bar in shown], 0.36, color=ours)
            axes.bar_label(found, [f"{bar.ours:.2f}" for bar in shown], padding=3, color=ink, weight="bold")
            axes.set_yticks(places, [bar.what for bar in shown])
            axes.invert_yaxis()
            axes.set_title(dtype, loc="left", fontsize=11, weight="bold")
            axes.axvline(1, color=ink, linewidth=1, linestyle="--")
            axes.tick_params(length=0)
            axes.set_frame_on(False)
            axes.grid(axis="x", color=grid, linewidth=0.6)
            axes.set_axisbelow(True)
        names = ["convnext_kernels", "fastest other peer"]
        figure.legend([found, peers], names, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
        axes.set_xlim(0, 1.22 * max([1.0, *(value for bar in rows for value in (bar.ours, bar.peer or 0))]))
        axes.set_xlabel("times faster than eager PyTorch (dashed line)")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Description": description(run)})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(compact(drawn.getvalue()), encoding="utf-8")


def compact(svg: str) -> str:
    """`svg` with a line for each group."""
    return re.sub(r"\s*\n\s*", " ", svg.strip()).replace(" <g", "\n<g") + "\n"


def losses(run: Run) -> str:
    """How often a peer is faster than this package, and where most."""
    cases, lost = len(speedups(run.cases().values(), best_peer)), report.losses(run)
    if not lost:
        return f"No peer is faster in any of the {cases} cases of this record."
    _, name, peer = lost[0]
    return (
        f"A peer is faster in {len(lost)} of the {cases} cases of this record; at worst this package is "
        f"{compared(run.cases()[name], peer)} (`{name}`)."
    )


def short_table(run: Run, others: Iterable[Run] = ()) -> list[str]:
    """What README shows of `run`, and of records of the same machine with an older instruction set."""

    def cell(case: Case) -> str:
        parts = (compared(case, EAGER), compared(case, other_peer(case)))
        return "<br>".join(part for part in parts if part != "-") or "-"

    shown = [(run, "", ROWS)]
    shown += [(o, f", limited to {limit(o)}", LIMITED_ROWS) for o in others if machine_name(o) == machine_name(run)]
    rows = [
        [what + place, *(cell(record.cases().get(name.format(dtype), {})) for dtype in DTYPES)]
        for record, place, chosen in shown
        for what, name in chosen
    ]
    alt = escape(description(run), {'"': "&quot;"})
    return [
        "<picture>",
        '  <source media="(prefers-color-scheme: dark)" srcset="docs/images/speedup-dark.svg">',
        f'  <img alt="{alt}" src="docs/images/speedup-light.svg" width="640">',
        *("</picture>", ""),
        *paragraph(f"Measured on {machine(run)}. {losses(run)}"),
        *table(("", *DTYPES), [row for row in rows if row[1:] != ["-", "-"]]),
    ]


def home(run: Run) -> list[str]:
    """What the first page of the site shows of `run`."""
    alt = description(run)
    pictures = [f"![{alt}](images/speedup-{name}.svg#only-{name})" for name in ("light", "dark")]
    return [*pictures, "", *paragraph(f"Measured on {machine(run)}. {losses(run)}")]


def counted(op: str, file: Path) -> list[str]:
    """What `file` counts of `op`: a row for each case, a column for each kind of figure."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    rows: dict[str, dict[str, str]] = {}
    for case, kind, value in re.findall(r"^\| (.+?): (.+?) \| (.+?) \|", text, re.MULTILINE):
        if case.startswith(f"{op} ") and not kind.startswith("share "):  # of one kernel, not of a call
            rows.setdefault(case.removeprefix(f"{op} "), {})[kind] = value
    kinds = dict.fromkeys(kind for row in rows.values() for kind in row)
    if not rows:
        return []
    return table(("case", *kinds), ([case, *(row.get(k, "-") for k in kinds)] for case, row in rows.items()))


def op_figures(op: str, run: Run | None, root: Path) -> list[str]:
    """What the page of `op` shows: its times in `run`, and what its kernels for GPUs execute and move."""
    lines: list[str] = []
    parts = {} if run is None else by(run, lambda record: (record.group, record.direction))
    for direction in ("forward", "training") if op in SHOWN else ():
        cases = [case for case in parts.get((op, direction), []) if first(case).what.startswith(SHOWN[op])]
        if cases:
            lines += [] if lines else ["", *paragraph(f"Measured on {machine(run)}.")]
            lines += long_table("Forward" if direction == "forward" else "Forward and backward", direction, cases)
    for name, file, command in COUNTED:
        rows = counted(op, root / file)
        text = f"Counted, not timed: the {name} kernels' PTX, executed on a CPU and written by `{command}`."
        lines += ["", f"#### {name}", "", *paragraph(text), *rows] if rows else []
    return lines[1:] or ["No record yet."]


def long_table(title: str, direction: str, cases: list[Case]) -> list[str]:
    """Every case of a group, a row each."""

    def milliseconds(case: Case, candidate: str | None) -> str:
        record = case.get(candidate)
        return "-" if record is None else number(record.times.median) if record.times else record.status

    def kept(case: Case) -> str:
        found = [case[name].saved_bytes for name in (EAGER, OURS) if name in case]
        return "-" if len(found) < 2 or None in found else " / ".join(number(size / 2**20) for size in found)

    training, rows = direction == "training", []
    titles = ["case", "dtype", "batch", "eager, ms", "fastest other peer, ms", "ours, ms", "ours compared with eager"]
    titles += ["with the fastest other peer", *(["MiB kept for backward, eager / ours"] if training else [])]
    for case in sorted(cases, key=lambda case: (first(case).what.split(" ")[0], first(case).dtype)):
        record, other = first(case), other_peer(case)
        row = [record.what, record.dtype, str(record.batch), milliseconds(case, EAGER)]
        row.append("-" if other is None else f"{milliseconds(case, other)} {named(other)}")
        row += [milliseconds(case, OURS), compared(case, EAGER), compared(case, other)]
        rows.append([*row, kept(case)] if training else row)
    return ["", f"#### {title}", *table(titles, rows)]


def summary(parts: dict[tuple[str, str], list[Case]]) -> list[str]:
    """Single ops: geometric means."""
    rows = []
    for group, direction in SUMMARISED:
        cases = parts.get((group, direction), [])
        both = [speedups(cases, lambda case: EAGER), speedups(cases, best_peer)]
        if all(both):
            means = (f"{statistics.geometric_mean(values):.2f} times" for values in both)
            lost = ", ".join(str(sum(value < 1 for value in values)) for values in both)
            rows.append([group, direction, *means, f"{lost} of {len(both[1])}"])
    titles = ("op", "direction", "faster than eager, geometric mean", "than the fastest peer, geometric mean")
    titles += ("cases slower than eager, than the fastest peer",)
    return ["", "#### Single ops", *table(titles, rows)] if rows else []


def render(run: Run) -> list[str]:
    """What docs/benchmarks.md shows of `run`."""
    lines = [f"### {title(run)}", "", *paragraph(f"{machine(run)}. {losses(run)}")]
    for line in run.conditions.get("warnings", []):
        lines += ["", *paragraph(f"Warning: {line}.")]
    bad = sum(record.status in (WRONG, FAILED) for record in run.records)
    if bad:
        lines += ["", f"{bad} of {len(run.records)} results were wrong or failed; they have no times."]
    parts = by(run, lambda record: (record.group, record.direction))
    for group, direction in TITLES:
        if (group, direction) in parts:
            lines += long_table(TITLES[group, direction], direction, parts[group, direction])
    return lines + summary(parts)


def pages(root: Path, runs: list[Run]) -> dict[Path, list[str]]:
    """The lines between the markers of every file."""
    nothing = ["No record yet."]
    found = {
        root / "README.md": short_table(runs[0], filter(limit, runs[1:])) if runs else nothing,
        root / "docs/benchmarks.md": [line for run in runs for line in ["", *render(run)]][1:] or nothing,
    }
    if (home_page := root / "docs/index.md").exists():
        found[home_page] = home(runs[0]) if runs else nothing
    for page in sorted(root.glob("docs/ops/*.md")):
        if BEGIN in page.read_text(encoding="utf-8"):
            found[page] = op_figures(page.stem, runs[0] if runs else None, root)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Update the files, or check them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    chosen = parser.parse_args(arguments)
    update: dict[Path, Callable[[], object]] = {}  # how each file that is out of date is made
    try:
        runs = records(chosen.root / "benchmarks" / "results")
        for file, lines in pages(chosen.root, runs).items():
            text = file.read_text(encoding="utf-8")
            if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
                raise ValueError(f"{file}: expected one {BEGIN} and, after it, one {END}")
            before, after = text.partition(BEGIN)[0], text.partition(END)[2]
            wanted = "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"])
            if wanted != text:
                update[file] = partial(file.write_text, wanted, encoding="utf-8")
        for theme in ("light", "dark") if runs else ():
            file = chosen.root / "docs" / "images" / f"speedup-{theme}.svg"
            if not file.exists() or escape(description(runs[0])) not in file.read_text(encoding="utf-8"):
                update[file] = partial(draw, runs[0], file, theme == "dark")
        for make in () if chosen.check else update.values():
            make()
    except (OSError, ValueError) as error:
        print(f"update_readme: {error}", file=sys.stderr)
        return 1
    for file in update if chosen.check else ():
        print(f"update_readme: {file} is out of date: run python benchmarks/update_readme.py", file=sys.stderr)
    return 1 if update and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())
