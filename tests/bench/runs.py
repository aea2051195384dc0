"""Runs to compare, to report and to publish: the record that is shipped, and changes of it."""

import copy
import dataclasses
import functools
from pathlib import Path

from convnext_kernels.bench.results import Run, Times, load

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@functools.cache
def _shipped() -> Run:
    return load(next(RECORDS.glob("*-standard.json")))


def full_run(**changes: object) -> Run:
    """The largest run that is shipped, with some fields changed."""
    run = _shipped()
    own = {name: copy.deepcopy(getattr(run, name)) for name in ("machine", "conditions", "checks", "not_run")}
    return dataclasses.replace(run, **own | {"records": [*run.records]} | changes)


def machine(cpu: str = "Example Xeon 6", gpus: tuple[str, ...] = (), torch: str = "2.14.1") -> dict:
    """The machine of a run."""
    found = full_run().machine
    return found | {
        "cpu": found["cpu"] | {"name": cpu},
        "gpus": [*gpus],
        "libraries": found["libraries"] | {"torch": torch},
    }


def times(median: float) -> Times:
    """Rounds of calls that all took `median` milliseconds."""
    return Times(((median,) * 3,) * 5)


def replace(run: Run, case: str, candidate: str, **changes: object) -> Run:
    """`run` with one record changed."""
    changed = [
        dataclasses.replace(r, **changes) if (r.case, r.candidate) == (case, candidate) else r for r in run.records
    ]
    assert changed != run.records
    return dataclasses.replace(run, records=changed)
