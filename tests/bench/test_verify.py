"""The steps of `verify` and the process that runs them; tests/cli/test_verify.py runs the command."""

import os
import time
from functools import partial

from convnext_kernels.bench import lines, steps, verify, workloads
from convnext_kernels.bench.cases import Case

BUILD = partial(workloads.op, "grn", 1, 8, 5, 3)


def _case(what, build=BUILD):
    return steps.Item("numerics fp32", what, Case("grn", what, 1, "fp32", "training", "", build))


def _raise():
    raise ValueError("no such shape")


def _crash():
    os.abort()


def _hang():
    time.sleep(1000)


ITEMS = [
    _case("raises", _raise),
    _case("crashes", _crash),
    _case("hangs", _hang),
    steps.Item("host time", "is unknown", "block V3"),
    _case("is right"),
]


def test_a_failure_is_one_line_and_not_the_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(steps, "items", lambda step, device: ITEMS if step == "numerics fp32" else [])
    item = verify.Verify._item

    def impatient(self, worker, what, limit, seconds):  # with what hangs, and with nothing that must end
        item(self, worker, what, 1.0 if what.name == "hangs" else limit, seconds)

    monkeypatch.setattr(verify.Verify, "_item", impatient)
    run = verify.Verify("cpu", tmp_path, only=("numerics fp32",), threads=1)
    assert run.run() == 1
    said = capsys.readouterr().out.splitlines()
    (found,) = lines.read(tmp_path / lines.FILE)
    failures = {line["item"]: line["reason"] for line in lines.of_kind(found, "failure")}
    assert failures.pop("is unknown").startswith("AttributeError: ")
    assert failures == {
        "crashes": "the process that ran it ended with signal SIGABRT",
        "hangs": "no result after 1 s, ended",
    }
    found = lines.of_kind(found, "check")
    assert {(c["status"], c["reason"]) for c in found if c["what"] == "raises"} == {
        ("failed", "ValueError: no such shape")
    }
    assert {c["status"] for c in found if c["what"] == "is right"} == {"ok"}
    assert "Error: " in verify.verdict(run, 1)
    assert sum("crashes" in line for line in said) == 1


def test_a_model_in_plain_pytorch_has_the_same_results_and_no_op_of_this_package():
    import torch

    workload = workloads.network("convnextv2_atto", 1, 64)
    names = {type(module).__module__ for module in workload.eager.modules()}
    assert not any(name.startswith("convnext_kernels.nn") for name in names)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expected = workload.eager(*workload.inputs)
    assert not any(event.name.startswith("convnext_kernels") for event in profile.events())
    torch.testing.assert_close(workload.ours(*workload.inputs), expected, rtol=1e-4, atol=1e-4)
