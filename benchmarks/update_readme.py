"""Write the measured figures of README.md and of the documentation from the records in benchmarks/results.

    python benchmarks/update_readme.py [--check]

README.md and docs/index.md get a chart (docs/images/speedup.svg) and README.md a short table, of the newest undisturbed
record (one without warnings); the pages of ops get their cases of that record, docs/benchmarks.md all other cases of
every record. Nothing between the markers is typed by hand. --check writes nothing and fails where a file is out of
date.
"""

import argparse
import dataclasses
import datetime
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

from convnext_kernels.bench import report
from convnext_kernels.bench.report import machine_name, speedups
from convnext_kernels.bench.results import EAGER, FAILED, OURS, WRONG, Case, Run, best_peer, load, ratio
from convnext_kernels.bench.tables import Table, speedup

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin (python benchmarks/update_readme.py) -->"
END = "<!-- results: end -->"
DTYPES = ("fp32", "bf16")
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

OPS = ("dwconv", "layernorm", "mlp", "block")  # with a page of their own
LIMITED_ROWS = (ROWS[0], ROWS[5])  # of the same machine's records with an older instruction set


def records(folder: Path) -> list[Run]:
    """The complete runs: those that nothing disturbed, the others, those of an older instruction set; newest first."""
    found = [run for file in folder.glob("*.json") if (run := load(file)).complete]
    found.sort(key=lambda run: datetime.datetime.fromisoformat(run.created), reverse=True)
    return sorted(found, key=lambda run: (limit(run) is not None, bool(run.conditions.get("warnings"))))


def limit(run: Run) -> str | None:
    """The instruction set that the CPU was limited to."""
    return run.machine.get("environment", {}).get("CONVNEXT_KERNELS_CPU_ISA") if run.device == "cpu" else None


def title(run: Run) -> str:
    """The machine, and what it was limited to."""
    return machine_name(run) + ("" if limit(run) is None else f", limited to {limit(run)}")


def paragraph(text: str) -> list[str]:
    """`text` in lines of README's width."""
    return textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)


def compared(case: Case, to: str | None) -> str:
    """How ours compares, as "1.30 times faster than OpenVINO"; "-" without both times."""
    return speedup(ratio(case, to), to or "")


def other_peer(case: Case) -> str | None:
    """The fastest peer beside eager, with which ours is compared anyway."""
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


def bars(run: Run) -> list[tuple[str, float, float, str]]:
    """README's chart: of whole models, how many times faster than eager this package and the fastest other peer are.

    What with the dtype, ours, the peer's (0 without one), and the peer's with its name.
    """
    found, cases = [], run.cases()
    for dtype in DTYPES:
        for what, name in ROWS:
            case = cases.get(name.format(dtype), {})
            ours, other = ratio(case), other_peer(case)
            if name.startswith("model/") and ours is not None:
                peer = case[EAGER].times.median / case[other].times.median if other else 0
                found.append((f"{what}, {dtype}", ours, peer, f"{other} {peer:.2f}" if other else ""))
    return found


def description(run: Run) -> str:
    """What the chart shows, in words: the text for those who cannot see it, and what --check reads."""
    rows = (f"{what}: {OURS} {ours:.2f}" + f", {label}" * bool(label) for what, ours, _, label in bars(run))
    return f"Times faster than eager PyTorch on {machine_name(run)}. {'; '.join(rows)}."


def draw(run: Run, file: Path) -> None:
    """Draw README's chart: for each model and dtype, this package and the fastest other peer beside eager."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, ours, other = "#848d97", "#e4572e", "#6482ab"  # to be read on a light and on a dark page
    what, *values, labels = zip(*bars(run), strict=True)
    places = range(len(what))
    style = {"svg.fonttype": "none", "svg.hashsalt": OURS, "font.family": "sans-serif", "font.size": 11}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with rc_context(style):
        figure = Figure(figsize=(7.2, 0.9 + 0.5 * len(what)), layout="constrained")
        axes = figure.subplots()
        found = axes.barh([place - 0.2 for place in places], values[0], 0.36, color=ours, label=OURS)
        axes.bar_label(found, fmt="%.2f", padding=3, color=ink, weight="bold")
        peers = axes.barh([place + 0.2 for place in places], values[1], 0.36, color=other, label="fastest other peer")
        axes.bar_label(peers, labels, padding=6, color=ink, fontsize=9)
        axes.set_yticks(places, what)
        axes.invert_yaxis()
        axes.axvline(1, color=ink, linewidth=1, linestyle="--")
        axes.tick_params(length=0)
        axes.set_frame_on(False)
        axes.margins(x=0.25)
        axes.set_xlabel("times faster than eager PyTorch (dashed line)")
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=10)
        about = {"Date": None, "Description": description(run)}  # no date: the same record makes the same file
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, transparent=True, metadata=about)


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


def readme(run: Run, others: list[Run]) -> list[str]:
    """What README shows of `run`, and of the others of the same machine with an older instruction set."""

    def cell(case: Case) -> str:
        parts = (compared(case, EAGER), compared(case, other_peer(case)))
        return "<br>".join(part for part in parts if part != "-") or "-"

    shown = [(run, "", ROWS)]
    shown += [(o, f", limited to {limit(o)}", LIMITED_ROWS) for o in others if machine_name(o) == machine_name(run)]
    rows = [
        (what + place, *(cell(record.cases().get(name.format(dtype), {})) for dtype in DTYPES))
        for record, place, chosen in shown
        for what, name in chosen
    ]
    table = Table("", ("", *DTYPES), [row for row in rows if row[1:] != ("-", "-")])
    return [*home(run, "docs/"), "", *table.markdown().splitlines()]


def home(run: Run, folder: str = "") -> list[str]:
    """What the first page of the site shows of `run`: the chart, and a sentence."""
    chart = f"![{description(run)}]({folder}images/speedup.svg)"
    return [chart, "", *paragraph(f"Measured on {machine(run)}. {losses(run)}")]


def render(run: Run, elsewhere: Sequence[str] = ()) -> list[str]:
    """What docs/benchmarks.md shows of `run`: all tables but those of the groups `elsewhere`."""
    lines = [f"## {title(run)}", "", *paragraph(f"{machine(run)}. {losses(run)}")]
    for line in run.conditions.get("warnings", []):
        lines += ["", *paragraph(f"Warning: {line}.")]
    bad = sum(record.status in (WRONG, FAILED) for record in run.records)
    if bad:
        lines += ["", f"{bad} of {len(run.records)} results were wrong or failed; they have no times."]
    return lines + tables(run, {record.group for record in run.records}.difference(elsewhere))


def tables(run: Run, groups: set[str]) -> list[str]:
    """The tables of these groups, of depthwise convolutions 7x7."""
    shown = [r for r in run.records if r.group in groups and (r.group != "dwconv" or r.what.startswith("K7 "))]
    return [
        line
        for table in report.times(dataclasses.replace(run, records=shown))
        for line in ("", *table.markdown().splitlines())
    ]


def op_page(run: Run, op: str) -> list[str]:
    """What the page of an op shows of `run`."""
    return [*paragraph(machine(run).replace("(cpu_kernels", "(../cpu_kernels") + "."), *tables(run, {op})]


def pages(root: Path, runs: list[Run]) -> dict[Path, list[str]]:
    """The lines between the markers of every file."""
    nothing = ["No record yet."]
    return {
        root / "README.md": readme(runs[0], runs[1:]) if runs else nothing,
        root / "docs/index.md": home(runs[0]) if runs else nothing,
        **{root / f"docs/ops/{op}.md": op_page(runs[0], op) if runs else nothing for op in OPS},
        root / "docs/benchmarks.md": [
            *(render(runs[0], OPS) if runs else nothing),
            *(line for run in runs[1:] for line in ("", *render(run))),
        ],
    }


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
        chart = chosen.root / "docs" / "images" / "speedup.svg"
        known = chart.read_text(encoding="utf-8") if chart.exists() else ""
        if runs and escape(description(runs[0])) not in known:
            update[chart] = partial(draw, runs[0], chart)
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
