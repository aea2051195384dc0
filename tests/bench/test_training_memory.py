"""benchmarks/training_memory.py: what blocks keep is counted, and the peak of a step is that of the step."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from convnext_kernels import FusedConvNeXtBlock
from tests.shapes import TRITON, chosen

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MIB = 2**20
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("training_memory")


@chosen(lambda backend: backend != TRITON)
@pytest.mark.parametrize(("memory", "expected"), [("min", 2), ("balanced", 6), ("auto", 6)])
@pytest.mark.parametrize("use_grn", [False, True])
def test_backends_keep_what_was_asked_for(script, backend, memory, expected, use_grn):
    row = script.kept(backend, memory, use_grn, 208, 6, 1, "bf16")
    assert row.reason == ""
    assert row.kept == pytest.approx(1 if backend == "eager" else expected, abs=0.05)
    assert not row.exceeds


@pytest.mark.parametrize(("use_grn", "expected"), [(False, 12.02), (True, 19.05)])
def test_eager_keeps_a_multiple(script, use_grn, expected):
    row = script.kept(script.PYTORCH, "", use_grn, 96, 14, 1, "bf16")
    assert row.kept == pytest.approx(expected, abs=0.03)
    assert row.limit is None
    assert not row.exceeds


@pytest.mark.extended
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("default")  # torch.compile's own
def test_what_a_compiled_block_keeps_is_seen(script):
    row = script.kept(script.COMPILED, "", False, 96, 14, 1, "bf16")
    assert row.reason == ""
    assert 11 < row.kept < 13


def test_keeping_more_exceeds_the_limit(script, monkeypatch):
    forward = FusedConvNeXtBlock.forward

    def wasteful(self, x):
        y = forward(self, x)
        return y.exp().log()  # exp keeps its result, log its input: one more

    monkeypatch.setattr(FusedConvNeXtBlock, "forward", wasteful)
    row = script.kept("cpu", "min", False, 96, 14, 1, "fp32")
    assert row.kept == pytest.approx(3, abs=0.01)
    assert row.exceeds


def test_a_failing_block_exceeds_and_says_why(script):
    row = script.kept("no_such_backend", "min", False, 96, 7, 1, "fp32")
    assert row.kept is None
    assert row.exceeds
    assert "no_such_backend" in row.reason


def test_everybody_takes_part(script):
    found = script.candidates(quick=False)
    assert [who for who, *_ in found[:2]] == [script.PYTORCH, script.COMPILED]
    assert {memory for who, memory, *_ in found if who == "cpu"} == set(script.MEMORY)
    assert {who for who, *_ in found} >= {"cpu", "eager"}
    assert all(stages == script.STAGES for who, _, stages, _ in found if who == "cpu")


def test_verdicts_are_printed(script, capsys):
    row = script.Kept("cpu", "min", "V1", "C96", "bf16", 2.0)
    rows = [
        script.Kept(script.PYTORCH, "", "V1", "C96", "bf16", 12.0),
        row,
        dataclasses.replace(row, what="C192", kept=2.11),
        dataclasses.replace(row, memory="auto", kept=6.0),
    ]
    assert script.show_blocks(rows) == [rows[2]]
    text = " ".join(capsys.readouterr().out.split())
    assert "cpu min 2.00-2.11 at most 2.1 EXCEEDED" in text
    assert "cpu auto 6.00 at most 6.1 met" in text


def test_peaks_are_printed_beside_eagers(script, capsys):
    peaks = [
        script.Peak(script.PYTORCH, "bf16", 100 * MIB, 200 * MIB, 600 * MIB),
        script.Peak("accelerate", "bf16", 100 * MIB, 250 * MIB, 450 * MIB),
    ]
    script.show_steps(peaks, "ConvNeXt-T")
    text = " ".join(capsys.readouterr().out.split())
    assert "accelerate bf16 100 250 450 200 50% 350 70%" in text


def test_proc_status(script):
    text = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert script.status_bytes(text, "VmRSS") == MIB
    assert script.status_bytes(text, "VmHWM") == 2 * MIB


@needs_linux
def test_the_peak_is_that_of_what_ran_since_it_was_reset(script):
    held = torch.ones(128 * MIB, dtype=torch.uint8)
    del held
    script.tidy()
    script.reset_peak()
    before = script.resident()
    assert script.resident("VmHWM") - before < 32 * MIB
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    del held
    assert 60 * MIB < script.resident("VmHWM") - before < 90 * MIB


@pytest.mark.extended
@needs_linux
def test_a_step_in_a_process_of_its_own(script):
    found = script.in_a_process("models, min", "bf16", 1, 32, 1, 1)
    assert isinstance(found, script.Peak), found
    parameters = 28_589_128 * 2
    assert 0.5 * parameters < found.peak - found.before < 10 * parameters  # gradients at the least
    assert found.peak > found.before > found.loaded > 3 * parameters


@needs_linux
def test_a_failing_process_says_why(script):
    found = script.in_a_process("models, low", "bf16", 1, 32, 1, 1)
    assert isinstance(found, str)
    assert "memory" in found


@pytest.mark.parametrize(("value", "status"), [(2.0, 0), (2.2, 1)])
def test_command(script, monkeypatch, tmp_path, value, status):
    row = script.Kept("cpu", "min", "V1", "C96", "bf16", value)
    monkeypatch.setattr(script, "emulate", lambda: None)
    monkeypatch.setattr(script, "count", lambda quick, dtypes: [row])
    monkeypatch.setattr(script, "in_a_process", lambda who, dtype, *_: script.Peak(who, dtype, 1, 2, 3))
    file = tmp_path / "memory.json"
    done = CliRunner().invoke(script.main, ["--check", "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == status
    assert f"1 blocks with a limit, {status} exceed it" in done.output
    values = json.loads(file.read_text())
    assert values["blocks"] == [dataclasses.asdict(row)]
    assert len(values["step"]["peaks"]) == 2 * len(script.STEPS)
    assert values["machine"]["libraries"]["torch"]
    assert CliRunner().invoke(script.main, ["blocks"]).exit_code == 0
