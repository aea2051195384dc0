import pytest

from convnext_kernels.bench import report
from convnext_kernels.bench.results import EAGER, OURS
from convnext_kernels.bench.tables import number, speedup
from tests.bench import runs
from tests.pages import Page

BLOCK = "block/V1-C96-56x56-b1-fp32-forward"


@pytest.fixture
def write(tmp_path):
    """Write a report to a new folder."""

    def call(run):
        folder = tmp_path / "new" / "folder"
        assert report.write(run, folder) == f"Report: {folder / report.NAME}, results: {folder / 'results.json'}"
        return Page(folder / report.NAME)

    return call


def small(run, *words):
    """`run` with the cases that have one of `words` in their names."""
    run.records = [r for r in run.records if any(word in r.case for word in words)]
    return run


def test_a_run(write):
    run = small(runs.full_run(), "K7-C384", "layernorm/C96", "ConvNeXt-T-224", "rival/")
    found = write(run)
    for case, records in run.cases().items():
        assert case in found.text
        assert f"{number(records[EAGER].times.median)}" in found.text
    for words in (run.machine["cpu"]["name"], "device cpu", run.machine["commit"], run.created[:10], "complete"):
        assert words in found.text
    assert "Measured ceilings" in found.text
    assert "interrupted" not in found.text
    assert "no bf16 kernels for CPUs" in found.text


def test_what_is_wrong_or_failed_is_shown_and_has_no_speed(write):
    run = small(runs.odd_run(), "block/V1-C96", "block/V2-C96", "dwconv/K31-C768")
    found = write(run)
    assert "interrupted" in found.text
    for line in ("other processes use 34% of the machine", "threads are <not> pinned & drift"):
        assert line in found.text
    for line in report.complaints(run):
        assert line in found.text
    assert any("<script>alert('x')</script> & more" in line for line in report.complaints(run))
    assert (BLOCK, OURS) not in {row[:2] for table in report.everything(run) for row in table.rows}


def test_losses_are_listed_and_read_as_losses(write):
    run = small(runs.full_run(), "block/V1-C96-56x56-b1", "block/V1-C96-56x56-b8")
    best = min(r.times.median for name, r in run.cases()[BLOCK].items() if r.times and name != OURS)
    run = runs.replace(run, BLOCK, OURS, times=runs.times(1.25 * best))
    (loss,) = [loss for loss in report.losses(run) if loss[1] == BLOCK]
    assert loss[0] == pytest.approx(0.8, abs=0.02)
    found = write(run)
    assert speedup(loss[0]) in found.text
    assert " 0.8" not in speedup(loss[0])
    only = small(run, BLOCK)
    assert "slower than" not in write(runs.replace(only, BLOCK, OURS, times=runs.times(1e-6))).text


@pytest.mark.parametrize("words", [("nothing",), ("rival/",)])
def test_what_is_missing_is_left_out(write, words):
    found = write(small(runs.full_run(complete=False, ceilings={}, conditions={}), *words))
    assert ("All results" in found.text) == (words == ("rival/",))
    assert "slower than" not in found.text
