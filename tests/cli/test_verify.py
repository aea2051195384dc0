import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convnext_kernels.bench import checks, lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one(monkeypatch):
    """Leave one check in each step of numerics, on all backends."""
    monkeypatch.setattr(checks, "WIDE", ())
    monkeypatch.setattr(checks, "SHAPES", ((1, 8, 5, 3),))
    monkeypatch.setattr(checks, "KINDS", (("grn", "", ()),))


@pytest.mark.usefixtures("one")
def test_lines_text_and_report(run, tmp_path):
    folder, before = tmp_path / "new", os.environ.get("CONVNEXT_KERNELS_CACHE")
    result = run("verify", "--device", "cpu", "--only", "numerics", "--threads", 1, "--report", folder)
    assert result.exit_code == 0, result.output
    assert "not run: environment: no kernel was run on a GPU" in result.stdout
    assert "No kernel is wrong." in result.stdout
    ((head, *found),) = lines.read(folder / lines.FILE)
    assert head["device"] == "cpu"
    assert {"torch", "triton"} <= set(head["machine"]["libraries"])
    assert found[-1]["kind"] == "end"
    ended = lines.of_kind(found, "step")
    assert [line["step"] for line in ended[-3:]] == ["numerics bf16", "numerics fp32", "numerics fp16"]
    assert all(line["done"] == line["of"] == 1 for line in ended[-3:])
    assert {line["status"] for line in lines.of_kind(found, "check")} <= {"ok", "unavailable"}
    assert os.environ.get("CONVNEXT_KERNELS_CACHE") == before

    result = run("report", folder / lines.FILE, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "| grn |" in result.stdout


def test_wrong_usage(fails, run, tmp_path):
    words = ("--only", "'numbers'", "precompile", "models")
    fails("verify", "--device", "cpu", "--only", "numbers", words=words, code=2)
    (tmp_path / lines.FILE).write_text('{"kind": "environment", "format": 1}')  # of an older version
    words = ("choose another folder", "format 1, expected 2")
    fails("verify", "--device", "cpu", "--report", tmp_path, words=words, code=2)


# `verify` with items that take milliseconds, and more of them than anyone waits for.
MANY = """
import sys
from functools import partial
from convnext_kernels import cli
from convnext_kernels.bench import steps, workloads
from convnext_kernels.bench.cases import Case
build = partial(workloads.op, "grn", 1, 8, 5, 3)
many = [steps.Item("numerics fp32", f"{i}", Case("grn", f"{i}", 1, "fp32", "training", "", build)) for i in range(9999)]
steps.items = lambda step, device: many
cli.main(sys.argv[1:])
"""


def _started(folder: Path) -> subprocess.Popen:
    arguments = ["verify", "--device", "cpu", "--minutes", "5", "--only", "numerics fp32", "--report", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", MANY, *arguments], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
        file = folder / lines.FILE
        if file.exists() and file.read_text().count('"check"') > 2:
            return process
    process.kill()
    raise AssertionError("no results")


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_when_it_is_cut(run, tmp_path, number):
    process = _started(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    code = process.wait(30)
    text = (tmp_path / lines.FILE).read_text()
    for line in text.splitlines():
        json.loads(line)
    (found,) = lines.read(tmp_path / lines.FILE)
    assert len(lines.of_kind(found, "check")) > 2
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert (found[-1]["kind"], found[-1]["complete"], found[-1]["reason"]) == ("end", False, "cut by SIGTERM")
    end = time.monotonic() + 20
    while any(_alive(int(child)) for child in children) and time.monotonic() < end:
        time.sleep(0.1)
    assert children
    assert not any(_alive(int(child)) for child in children)

    # What a killed machine may leave: half a line. A later run begins a new one.
    (tmp_path / lines.FILE).write_text(text + text.splitlines()[-1][:40])
    lines.Writer(tmp_path / lines.FILE).close()
    result = run("report", tmp_path / lines.FILE, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "interrupted" in result.stdout
