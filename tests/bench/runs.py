"""Runs to compare, to report and to publish: the record that is shipped, and changes of it."""

import copy
import dataclasses
import functools
import math
from pathlib import Path

from convnext_kernels.bench.results import EAGER, FAILED, OURS, UNAVAILABLE, WRONG, Run, Times, load

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


def odd_run() -> Run:
    """A run that met everything that can go wrong."""
    run = full_run(complete=False, ceilings={"flops": {"fp32": 190e9}})
    run.conditions["warnings"] = ["other processes use 34% of the machine", "threads are <not> pinned & drift"]
    nothing = {"times": None}
    wrong = {"status": WRONG, "reason": "error 3.2e-01 against fp64 exceeds the allowed 1.0e-03", "error": 0.32}
    run = replace(run, "block/V1-C96-56x56-b1-fp32-forward", OURS, **wrong, **nothing)
    nan = {"status": WRONG, "reason": "the result holds NaN", "error": math.nan}
    run = replace(run, "block/V2-C96-56x56-b8-bf16-forward", "torch.compile", **nan, **nothing)
    failed = {"status": FAILED, "reason": "RuntimeError: <script>alert('x')</script> & more", "error": None}
    run = replace(run, "dwconv/K31-C768-7x7-b8-bf16-forward", OURS, **failed, **nothing)
    run = replace(run, "layernorm/C96-56x56-b1-fp32-forward", EAGER, **failed, **nothing)
    absent = {"status": UNAVAILABLE, "reason": "this package serves <ConvNeXts> only", "error": None}
    return replace(run, "mlp/V1-C96-56x56-b1-fp32-forward", OURS, **absent, **nothing)
