import re
import signal
import subprocess
import sys

import pytest

import convnext_kernels as ck
from convnext_kernels.bench import results
from convnext_kernels.bench.results import EAGER, OURS, WRONG

ONE = ("--only", "layernorm/C384*b1-fp32*", "--quick")


@pytest.fixture(autouse=True)
def without_compilers(monkeypatch):
    """Leave out the peers that take long to start; tests/bench/test_measure.py runs them."""
    from convnext_kernels.bench.measure import Session

    wanted = Session.wanted
    few = (EAGER, OURS, "eager, contiguous")
    monkeypatch.setattr(Session, "wanted", lambda self, case: [c for c in wanted(self, case) if c.name in few])


def test_tables_report_and_json(run, tmp_path):
    folder = tmp_path / "new" / "report"
    result = run("bench", *ONE, "--report", folder)
    assert result.exit_code == 0, result.output
    assert "layernorm, forward" in result.stdout
    assert re.search(r"C384 14x14 b1 fp32 .* (\d\.\d\dx (faster|slower)|as fast)", result.stdout)
    assert "…" not in result.stdout  # nothing is cut off at 80 columns
    shown = run("report", folder / "results.json").stdout
    assert "| layernorm/C384-14x14-b1-fp32-forward | convnext_kernels |" in shown
    found = results.load(folder / "results.json")
    assert found.complete
    assert found.mode == "quick"
    assert found.machine["convnext_kernels"] == ck.__version__
    assert {r.case for r in found.records} == {"layernorm/C384-14x14-b1-fp32-forward"}


def test_wrong_numbers_get_no_speed_and_fail(run, tmp_path, monkeypatch):
    forward = ck.LayerNorm2d.forward
    monkeypatch.setattr(ck.LayerNorm2d, "forward", lambda self, x: forward(self, x) * 1.01)
    result = run("bench", *ONE, "--report", tmp_path)
    assert result.exit_code == 1
    assert "convnext_kernels is wrong or failed in 1 of 1 cases" in result.stderr
    assert "wrong, not timed: output" in " ".join(result.stdout.split())
    assert not re.search(r"\d\.\d\dx", result.stdout)
    found = results.load(tmp_path / "results.json").cases().popitem()[1]
    assert found[OURS].status == WRONG
    assert found[OURS].times is None
    assert found[EAGER].times is not None


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with SIGINT ignored
from convnext_kernels import cli
from convnext_kernels.bench import measure
from convnext_kernels.bench.results import EAGER, OURS

whole, wanted = measure.Session.measure, measure.Session.wanted
measure.Session.wanted = lambda self, case: [c for c in wanted(self, case) if c.name in (EAGER, OURS)]

def announced(self, case, on_step):
    if case.group == "dwconv":
        print("second case", flush=True)
        while True:
            whole(self, case, on_step)
    return whole(self, case, on_step)

measure.Session.measure = announced
cli.main(["bench", "--quick", "--only", "layernorm/*fp32*", "--only", "dwconv", "--report", sys.argv[1]])
"""


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    arguments = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "second case\n"
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, error
    assert "Interrupted after 1 of 3 cases" in error
    assert "layernorm, forward" in output
    found = results.load(tmp_path / "results.json")
    assert not found.complete
    assert {r.case for r in found.records} == {"layernorm/C384-14x14-b1-fp32-forward"}
