import math

import pytest

from convnext_kernels.bench import report
from convnext_kernels.bench.results import EAGER, FAILED, OURS, WRONG
from tests.bench import runs

BLOCK = "block/V1-C96-56x56-b1-fp32-forward"


def small(run, *words):
    """`run` with the cases that have one of `words` in their names."""
    run.records = [r for r in run.records if any(word in r.case for word in words)]
    return run


def shown(run):
    return "\n".join([report.heading(run), *(table.markdown() for table in report.details(run))])


def test_a_run():
    run = small(runs.full_run(), "K7-C384", "layernorm/C96", "ConvNeXt-T-224", "rival/")
    found = shown(run)
    for case, records in run.cases().items():
        assert f"| {case} | {EAGER} | {report.number(records[EAGER].times.median)} |" in found
    for words in (run.machine["cpu"]["name"], "device cpu", run.machine["commit"], run.created[:10], "complete"):
        assert words in found
    assert "Measured ceilings" in found
    assert any("no bf16 kernels for CPUs" in line for line in report.absences(run))


def test_what_is_wrong_or_failed_is_told_and_has_no_speed():
    run = small(runs.full_run(complete=False), "block/V1-C96", "dwconv/K31-C768")
    bad = (("dwconv/K31-C768-7x7-b8-bf16-forward", EAGER, FAILED), (BLOCK, OURS, WRONG))
    for case, candidate, status in bad:
        run = runs.replace(run, case, candidate, status=status, reason="why", times=None, error=math.nan)
    found = shown(run)
    assert "interrupted" in found
    assert f"| {BLOCK} | {OURS} |" not in found
    assert report.complaints(run) == [f"{case}, {who}: {status}, not timed: why" for case, who, status in bad]


def test_losses():
    run = small(runs.full_run(), "block/V1-C96-56x56-b1", "block/V1-C96-56x56-b8")
    best = min(r.times.median for name, r in run.cases()[BLOCK].items() if r.times and name != OURS)
    run = runs.replace(run, BLOCK, OURS, times=runs.times(1.25 * best))
    (loss,) = [loss for loss in report.losses(run) if loss[1] == BLOCK]
    assert loss[0] == pytest.approx(0.8, abs=0.02)
    only = small(run, BLOCK)
    assert report.losses(runs.replace(only, BLOCK, OURS, times=runs.times(1e-6))) == []


@pytest.mark.parametrize("word", ["nothing", "rival/"])
def test_what_is_missing_is_left_out(word):
    run = small(runs.full_run(complete=False, ceilings={}, conditions={}), word)
    assert [table.title for table in report.details(run)] == ([] if word == "nothing" else ["rival"])
