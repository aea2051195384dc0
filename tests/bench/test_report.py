import io
import math

import pytest

from convnext_kernels.bench import report
from convnext_kernels.bench.results import EAGER, OURS, UNAVAILABLE, Record
from convnext_kernels.bench.tables import Table, look, number, short, speedup
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
    run = small(runs.full_run(), "K7-C384", "layernorm/C96", "ConvNeXt-T-224", "rival/", "scaling/")
    found = write(run)
    for case, records in run.cases().items():
        assert case in found.text
        assert f"{number(records[EAGER].times.median)}" in found.text
    for words in ("Example Xeon 6", "device cpu", "mode full", "2026-11-24 20:01", "0123456789ab", "complete"):
        assert words in found.text
    assert "Measured ceilings" in found.text
    assert "interrupted" not in found.text
    assert "no bf16 kernels for CPUs" in found.text


def test_a_gpu_has_launches(write):
    found = write(small(runs.full_run("cuda"), "K7-C384", "ConvNeXt-T-224-b1"))
    assert "Example H100" in found.text
    assert "launches" in found.text


def test_what_is_wrong_or_failed_is_shown_and_has_no_speed(write):
    run = small(runs.odd_run(), "block/V1-C96", "block/V2-C96", "dwconv/K31-C768")
    found = write(run)
    assert "interrupted" in found.text
    for line in ("other processes use 34% of the machine", "threads are <not> pinned & drift"):
        assert line in found.text
    for line in report.complaints(run):
        assert line in found.text
    assert any("<script>alert('x')</script> & more" in line for line in report.complaints(run))
    assert (BLOCK, OURS) not in {row[:2] for row in report.everything(run, "block").rows}


def test_losses_are_listed_and_read_as_losses(write):
    run = small(runs.full_run(), "block/V1-C96-56x56-b1", "block/V1-C96-56x56-b8")
    best = min(r.times.median for name, r in run.cases()[BLOCK].items() if r.times and name != OURS)
    run = runs.replace(run, BLOCK, OURS, times=runs.times(1.25 * best, noise=0))
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


def test_a_candidate_that_is_unavailable(write):
    run = runs.replace(small(runs.full_run(), BLOCK), BLOCK, EAGER, status=UNAVAILABLE, reason="<100> GiB", times=None)
    assert f"{EAGER}: <100> GiB (1 case)" in write(run).text


def check(op, what, dtype, backend, status, reason, error=None):
    """The record of a numerical check."""
    return Record(what, op, what, 1, dtype, "training", backend, status, reason, error=error, allowed_error=1e-6)


def test_checks_of_verify(write):
    run = runs.full_run(records=[], not_run=["no kernel was run on a GPU: <none> here"])
    run.checks = [
        check("dwconv", "1x8x9x9 K7", "fp32", "cpu", "ok", "", 1e-7),
        check("dwconv", "1x8x9x9 K9", "fp32", "cpu", "wrong", "gradient <dx>", math.nan),
        check("grn", "1x8x9x9", "bf16", "eager", "unavailable", "no bf16"),
    ]
    assert report.checks(run).rows == [
        ("dwconv", "cpu", "fp32", "1", "1", "0", ">100"),
        ("grn", "eager", "bf16", "0", "0", "1", ""),
    ]
    found = write(run)
    assert "no kernel was run on a GPU: <none> here" in found.text
    assert "dwconv 1x8x9x9 K9 fp32 on cpu: wrong, not timed: gradient <dx>" in found.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.01234, "0.0123"), (1, "1.00"), (12.34, "12.3"), (12345.6, "12346"), (-1.5, "-1.50")),
        *((math.nan, "nan"), (math.inf, "inf")),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_words():
    assert [short(name) for name in ("torch.compile, max-autotune", "OpenVINO", OURS)] == [
        *("max-autotune", "OpenVINO", "ours"),
    ]
    assert [speedup(x) for x in (1.352, 0.9, 1.0, None)] == ["1.35x faster", "1.11x slower", "as fast", "-"]
    assert speedup(2, "eager") == "2.00 times faster than eager"
    assert [look(c) for c in ("1.35x faster", "1.11x slower", "1", "wrong", "yes")] == [
        "good",
        "bad",
        "",
        "bad",
        "good",
    ]


def test_a_table():
    table = Table("t", ("what", "n", "shape"), [("[red]a", "1.0", "1x8"), ("b", "-", "2x9")])
    assert table.markdown().splitlines() == [
        *("### t", "", "| what | n | shape |", "|---|---|---|", "| [red]a | 1.0 | 1x8 |", "| b | - | 2x9 |"),
    ]
    assert table.right() == [False, True, False]
    from rich.console import Console

    console = Console(width=40, record=True, file=io.StringIO())
    console.print(table.rich())
    assert "[red]a" in console.export_text()
