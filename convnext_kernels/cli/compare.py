"""``convnext-kernels compare``: what changed between two runs of ``bench`` by more than the noise.

The noise: the spreads of both runs, and the changes of the peers.
"""

import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click

from convnext_kernels.bench.results import OURS, Record, Run, load
from convnext_kernels.bench.tables import Table, short, speedup
from convnext_kernels.cli import options

SAME, FASTER, SLOWER = "within noise", "faster", "slower"
LEAST_NOISE = 0.02  # a smaller change is never reported: two runs of one build differ by as much
CONTROLS = 10  # at least as many peers with times make a control group


class Change(NamedTuple):
    """One candidate of one case in two runs; None where it is missing."""

    a: Record | None
    b: Record | None
    verdict: str  # SAME, FASTER, SLOWER, "only in A", "only in B", or both statuses: "ok > wrong"
    change: float | None = None  # after / before - 1, of the medians: negative is faster
    noise: float | None = None  # a change up to this is noise


def control(a: Run, b: Run) -> float:
    """The change that nine of ten peers do not exceed between the runs; 0 with too few peers.

    A change of this package cannot change a peer, so this is the noise of the machine. The spreads do not contain it:
    they are taken within minutes, while a shared or warmer machine, or another layout in memory, changes whole runs.
    """
    left = {(r.case, r.candidate): r.times for r in a.records if r.candidate != OURS and r.times}
    right = {(r.case, r.candidate): r.times for r in b.records if r.times}
    moved = [abs(right[key].median / times.median - 1) for key, times in left.items() if key in right]
    return statistics.quantiles(moved, n=10, method="inclusive")[-1] if len(moved) >= CONTROLS else 0.0


def _pair(a: Record | None, b: Record | None, least: float) -> Change:
    if a is None or b is None:
        return Change(a, b, "only in B" if a is None else "only in A")
    if not a.times or not b.times:
        return Change(a, b, f"{a.status} > {b.status}")
    change, noise = b.times.median / a.times.median - 1, max(least, a.times.spread + b.times.spread)
    return Change(a, b, SAME if abs(change) <= noise else SLOWER if change > 0 else FASTER, change, noise)


def compare(a: Run, b: Run) -> list[Change]:
    """Compare run `b` with run `a`: a change for each (case, candidate) of either that has times, in the order of `a`.

    It is "faster" or "slower" if the change of the medians, b / a - 1, exceeds the noise. The noise is the largest of:
    the sum of the spreads of both runs (`Times.spread`: half the range of the medians of single rounds, over the
    median), the change that nine of ten peers do not exceed (`control`), and 2 %.
    """
    left, right = ({(r.case, r.candidate): r for r in run.records} for run in (a, b))
    least = max(LEAST_NOISE, control(a, b))
    changes = [_pair(left.get(key), right.get(key), least) for key in dict.fromkeys((*left, *right))]
    return [c for c in changes if any(r and r.times for r in (c.a, c.b))]


def differences(a: Run, b: Run) -> list[str]:
    """A line for each reason why `a` and `b` may not be comparable."""

    def facts(run: Run) -> dict[str, object]:
        gpus, cpu = ", ".join(run.machine.get("gpus", ())) or "none", run.machine.get("cpu", {}).get("name")
        name = {"GPU": gpus} if run.device == "cuda" else {"CPU": cpu}
        settings = {"threads": run.conditions.get("threads"), "device": run.device, "mode": run.mode}
        return name | settings | {"PyTorch": run.machine.get("libraries", {}).get("torch")}

    left, right = facts(a), facts(b)
    different = [name for name in left if name in right and left[name] != right[name]]
    lines = [f"{name} differs: {left[name]} in A, {right[name]} in B" for name in different]
    return lines + [f"run {name} is incomplete" for name, run in (("A", a), ("B", b)) if not run.complete]


def table(changes: Iterable[Change]) -> Table:
    """A row for each change."""
    rows = []
    for c in changes:
        record = c.a or c.b
        times = (f"{r.times.median:.3g}" if r and r.times else "" for r in (c.a, c.b))
        noise = "" if c.noise is None else f"{c.noise:.1%}"
        verdict = speedup(1 / (1 + c.change)) if c.verdict in (FASTER, SLOWER) else c.verdict
        rows.append((record.case, short(record.candidate), *times, noise, verdict))
    return Table("", ("case", "candidate", "A ms", "B ms", "noise", "B is"), rows)


def summary(changes: list[Change], moved: float) -> str:
    """How well two runs agree; `moved` is their `control`."""
    counts = Counter(change.verdict for change in changes)
    factors = [1 + change.change for change in changes if change.change is not None]
    if not factors:
        return "No candidate has times in both runs."
    least = f"{LEAST_NOISE:.0%}"
    if moved > LEAST_NOISE:
        least = f"{moved:.0%}, which nine of ten peers do not exceed,"
    return (
        f"{counts[SAME]} of {len(factors)} times agree within the noise (the sum of both spreads, or {least} if that "
        f"is more). Beyond it, {counts[FASTER]} are faster and {counts[SLOWER]} are slower in B.\n"
        f"Over all times B is {speedup(1 / statistics.geometric_mean(factors), 'A')} (geometric mean)."
    )


@click.command("compare")
@click.argument("a", type=options.INPUT, metavar="A.json")
@click.argument("b", type=options.INPUT, metavar="B.json")
def command(a: Path, b: Path) -> None:
    """Show what became faster or slower from A.json to B.json, two result files of `bench`.

    A change counts if it exceeds the noise: the sum of the spreads of both runs, or 2%, or the change that nine of ten
    peers do not exceed, whichever is most. This package cannot change its peers, so their changes show the noise of
    the machine. Warns if the runs are not comparable.
    """
    runs = [load(file) for file in (a, b)]
    changes = compare(*runs)
    for name, file, run in zip("AB", (a, b), runs, strict=True):
        click.echo(f"{name}: {file}, {run.created}")
    if shown := [change for change in changes if change.verdict != SAME]:
        options.show(table(shown))
    click.echo(summary(changes, control(*runs)))
    for line in differences(*runs):
        click.secho(f"warning: {line}", fg="yellow")
