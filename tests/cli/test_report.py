"""`report`: runs of `verify` on a GPU, as their lines are."""

import json
import math

import pytest

from convnext_kernels.bench import lines
from convnext_kernels.bench.results import EAGER, OURS, WRONG, Record, plain
from convnext_kernels.bench.timing import Times
from tests.bench.runs import machine

CASE = ("model/ConvNeXt-T-224-b1-bf16-forward", "model", "ConvNeXt-T 224", 1, "bf16", "forward")
KEY = "NVIDIA H100|0.1.0, torch 2.11.0, triton 3.6.0|mlp|32,96,56,56"


def record(candidate, milliseconds):
    return {"kind": "record"} | plain(Record(*CASE, candidate, "ok", times=Times(((milliseconds,),) * 5)))


def timing(backend, plan, median, error=""):
    shape = {"op": "block", "shape": [32, 96, 56, 56], "phase": "forward"}
    return {"kind": "timing", **shape, "backend": backend, "plan": plan, "median": median, "error": error}


@pytest.fixture
def file(tmp_path):
    """Writes runs; the first line of each is made here."""

    def write(*runs, name="results.jsonl", gpu="NVIDIA H100 80GB HBM3", cut=""):
        head = {"kind": "environment", "format": lines.FORMAT, "name": gpu, "device": "cuda"}
        head |= {
            "created": "2026-11-29T10:00:00+00:00",
            "conditions": {"warnings": []},
            "machine": machine(gpus=(gpu,)),
        }
        each = [line | {"step": "", "at": float(i)} for found in runs for i, line in enumerate([head, *found])]
        path = tmp_path / name
        path.write_text("".join(json.dumps(plain(line)) + "\n" for line in each) + cut)
        return path

    return write


@pytest.fixture
def first():
    where = ("dwconv/K7", "dwconv", "1x8x5x3 K7", 1, "bf16", "training")
    check = Record(*where, "triton", WRONG, "nan", error=math.nan, allowed_error=0.1)
    return [
        {"kind": "check"} | plain(check),
        record(EAGER, 3.0),
        record(OURS, 2.0),
        record(f"{OURS}, CUDA graph", 1.0),
        record("torch.compile", 1.5),
        {"kind": "host", "what": "block V1", "direction": "forward", "candidate": "ours", "us": 20.0, "units": 0.75},
        timing(EAGER, "", 4e-4),
        timing("triton", "mlp: fused", 1e-4),
        timing("triton", "mlp: gemm", None, "OutOfResources: shared memory"),
        {"kind": "choices", "choices": {KEY: "fused"}},
        {"kind": "step", "reason": "skipped: budget: 3 of 4, from x"},
    ]


def test_tables_report_and_choices_of_a_cut_file(run, file, first, tmp_path):
    path = file(first, cut='{"kind": "record", "st')
    choices = tmp_path / "measured_H100.json"
    result = run("report", path, "--report", tmp_path / "report", "--choices", choices)
    assert result.exit_code == 0, result.output
    for line in (
        f"| {CASE[0]} | eager | 3.00 | 3.00 | ±0.0% | 1.50x faster |",
        f"| {CASE[0]} | {OURS}, CUDA graph | 1.00 | 1.00 | ±0.0% | 2.00x slower |",
        "| block V1 | forward | ours | 20.0 | 0.750 |",
        "| block 32x96x56x56 | forward | 3 | 0.400 | 0.100 | 4.00 times faster than eager | triton mlp: fused |",
    ):
        assert line in result.stdout
    assert ": skipped: budget: 3 of 4, from x" in result.stderr
    assert json.loads(choices.read_text())["entries"] == {KEY: "fused"}
    assert "interrupted" in result.stdout
    assert "| dwconv | triton | bf16 | 0 | 1 | 0 | >100 |" in result.stdout
    assert "dwconv/K7, triton: wrong" in result.stderr
    assert (tmp_path / "report" / "results.json").exists()


def test_of_two_results_the_later_one_counts(file, first):
    runs = lines.read(file(first, [record(OURS, 0.5), {"kind": "end", "complete": True}]))
    runs += lines.read(file([record("torch.compile", 4.0)], name="other.jsonl"))
    found = lines.as_run(runs)
    times = {name: r.times.median for name, r in found.cases()[CASE[0]].items()}
    assert times == {EAGER: 3.0, OURS: 0.5, f"{OURS}, CUDA graph": 1.0, "torch.compile": 4.0}
    assert not found.complete
    (check,) = found.checks
    assert math.isnan(check.error)


def test_what_cannot_be_read(fails, file, first, tmp_path):
    other = file(first, gpu="NVIDIA A100", name="other.jsonl")
    fails("report", file(first), other, words=("measured on NVIDIA A100, expected NVIDIA H100 80GB HBM3",))
    (tmp_path / "no.jsonl").write_text("{}\n")
    fails("report", tmp_path / "no.jsonl", words=("no.jsonl", "no results of `convnext-kernels verify`"))
    damaged = file(first)
    damaged.write_text(damaged.read_text().replace('"kind": "host"', '"kind": "ho', 1))
    fails("report", damaged, words=("results.jsonl:7", "not a line of `convnext-kernels verify`"))
