"""What changed between two runs by more than the noise: their spreads, and the changes of the peers."""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from convnext_kernels.bench.results import OK, OURS, Record, Run

FASTER, SLOWER, SAME = "faster", "slower", "within noise"
ONLY_A, ONLY_B = "only in A", "only in B"
STATUS_CHANGED = "status changed"
NO_TIMES = "no times"  # in neither run, with the same status

LEAST_NOISE = 0.02  # a smaller change is never reported: two runs of one build differ by as much
CONTROLS = 10  # at least as many peers with times make a control group


@dataclass(frozen=True)
class Change:
    """One candidate of one case in two runs; a missing value is None."""

    case: str
    candidate: str
    before: float | None  # median, in milliseconds
    after: float | None
    change: float | None  # after / before - 1: negative is faster
    noise: float | None  # a change up to this is noise
    verdict: str
    status_before: str | None
    status_after: str | None


def control(a: Run, b: Run) -> float:
    """The change that nine of ten peers do not exceed between the runs; 0 with too few peers.

    A change of this package cannot change a peer, so this is the noise of the machine. The spreads do not contain it:
    they are taken within minutes, while a shared or warmer machine, or another layout in memory, changes whole runs.
    """
    left = {(r.case, r.candidate): r.times for r in a.records if r.candidate != OURS and r.times}
    right = {(r.case, r.candidate): r.times for r in b.records if r.times}
    moved = [abs(right[key].median / times.median - 1) for key, times in left.items() if key in right]
    return statistics.quantiles(moved, n=10, method="inclusive")[-1] if len(moved) >= CONTROLS else 0.0


def _pair(key: tuple[str, str], a: Record | None, b: Record | None, least: float) -> Change:
    before = None if a is None or a.times is None else a.times.median
    after = None if b is None or b.times is None else b.times.median
    change = noise = None
    if a is None or b is None:
        verdict = ONLY_B if a is None else ONLY_A
    elif a.status != b.status:
        verdict = STATUS_CHANGED
    elif before is None or after is None:
        verdict = NO_TIMES
    else:
        change = after / before - 1
        noise = max(least, a.times.spread + b.times.spread)
        verdict = SAME if abs(change) <= noise else SLOWER if change > 0 else FASTER
    return Change(*key, before, after, change, noise, verdict, a and a.status, b and b.status)


def compare(a: Run, b: Run) -> list[Change]:
    """Compare run `b` with run `a`: a change for each (case, candidate) of either, in the order of `a`.

    The verdict is "faster" or "slower" if the change of the medians, b / a - 1, exceeds the noise. The noise is the
    largest of: the sum of the spreads of both runs (`Times.spread`: half the range of the medians of single rounds,
    over the median), the change that nine of ten peers do not exceed (`control`), and 2 %. The verdict is
    "status changed" if the status (ok, wrong, failed, unavailable) differs, and "no times" without times in both.
    """
    left, right = ({(r.case, r.candidate): r for r in run.records} for run in (a, b))
    least = max(LEAST_NOISE, control(a, b))
    return [_pair(key, left.get(key), right.get(key), least) for key in dict.fromkeys((*left, *right))]


@dataclass(frozen=True)
class Summary:
    """How well two runs agree."""

    timed: int  # with times in both
    agree: int  # of these, within the noise
    counts: dict[str, int]  # by verdict
    mean: float | None  # geometric mean of after / before


def summary(changes: Iterable[Change]) -> Summary:
    """Sum up what `compare` returns."""
    changes = list(changes)
    counts = Counter(change.verdict for change in changes)
    factors = [1 + change.change for change in changes if change.change is not None]
    mean = statistics.geometric_mean(factors) if factors else None
    return Summary(len(factors), counts[SAME], dict(counts), mean)


def gone_bad(changes: Iterable[Change]) -> list[Change]:
    """Candidates that had times in A and are wrong, failed or unavailable in B."""
    return [change for change in changes if change.status_before == OK and change.status_after not in (OK, None)]


def _conditions(run: Run) -> dict[str, object]:
    """What two comparable runs have in common."""
    machine = run.machine
    found = {
        "CPU": machine.get("cpu", {}).get("name"),
        "GPU": ", ".join(machine.get("gpus", ())) or "none",
        "threads": run.conditions.get("threads"),
        "PyTorch": machine.get("libraries", {}).get("torch"),
        "device": run.device,
        "mode": run.mode,
    }
    if run.device == "cpu":
        found.pop("GPU")  # it was not used
    return found


def differences(a: Run, b: Run) -> list[str]:
    """A line for each reason why `a` and `b` may not be comparable."""
    left, right = _conditions(a), _conditions(b)
    lines = [
        f"{name} differs: {left[name]} in A, {right[name]} in B"
        for name in left
        if name in right and left[name] != right[name]
    ]
    lines += [f"run {name} is incomplete" for name, run in (("A", a), ("B", b)) if not run.complete]
    return lines
