"""What works without the packages that are nice to have, and what is said about the missing one.

Nothing imports them before they are used (tests/test_layering.py, tests/test_import.py), so one process hides each in
turn, and a fresh one all together.
"""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from convnext_kernels import environment
from convnext_kernels.bench import checks, conditions, lines, report, steps, verify, workloads
from convnext_kernels.bench.cases import Case, network
from convnext_kernels.bench.results import EAGER, plain
from convnext_kernels.tuning import cache

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("platformdirs", "filelock", "rich", "click", "jinja2", "matplotlib", "psutil")
BUILD = partial(workloads.op, "layernorm", 1, 8, 5, 3)
CASE = Case("layernorm", "1x8x5x3", 1, "fp32", "training", "", BUILD)
ITEM = steps.Item("numerics fp32", "layernorm 1x8x5x3 fp32", CASE)


@pytest.fixture
def hide(monkeypatch):
    """``hide(name)``: an import of that package raises ModuleNotFoundError, also of its modules loaded before."""

    def hidden(name: str) -> None:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return hidden


@pytest.mark.parametrize("name", ["jinja2", "matplotlib", "psutil"])  # what the others are for does not change
def test_without(name, hide, monkeypatch, tmp_path):
    """The conditions, a check and the report, in this process."""
    hide(name)
    monkeypatch.setattr(checks, "backends", lambda device: ([("eager", nullcontext)], []))
    write = lines.Writer(tmp_path / lines.FILE)
    machine, found = environment.collect(), conditions.collect("cpu")
    head = {"format": lines.FORMAT, "name": "a CPU", "device": "cpu", "created": "2026-11-29T10:00:00+00:00"}
    write("environment", "", **head, machine=machine, conditions=found)
    running = steps.Running("cpu")

    def emit(kind, value):
        line = write(kind, "", **plain(value))
        assert not verify.complaint(line), verify.complaint(line)

    model = steps.Item("models", "eager", (network("ConvNeXt-T", 1, "fp32", "forward"), EAGER))
    for item in (ITEM, model)[: 2 if name == "psutil" else 1]:  # which tells how much memory is free
        steps.run(running, item, emit, None, {})
    running.session.close()
    write.close()
    run = lines.as_run(lines.read(tmp_path / lines.FILE))
    assert [check.status for check in run.checks] == ["ok"]
    assert [record.times is not None for record in run.records] == [True] * (name == "psutil")
    said = report.write(run, tmp_path)
    assert (tmp_path / report.NAME).exists() == (name not in ("jinja2", "matplotlib"))
    if name in ("jinja2", "matplotlib"):
        assert f'the report needs {name}, which is not installed: pip install "convnext-kernels[demo]"' in said
    unknown = any("the load of the machine is unknown: psutil is not installed" in line for line in found["warnings"])
    assert unknown == (name == "psutil")


ALL_HIDDEN = """
import json, runpy, sys
_, folder, *hidden = sys.argv
sys.modules.update(dict.fromkeys(hidden))  # None: their import raises ModuleNotFoundError

import torch
import convnext_kernels as ck
from convnext_kernels.bench import checks
from convnext_kernels.tuning import GPUS, cache

def gradient(backend):
    torch.manual_seed(0)
    block, x = ck.FusedConvNeXtBlock(8, layer_scale_init_value=1.0, backend=backend), torch.randn(1, 8, 5, 3)
    return torch.autograd.grad(block(x.requires_grad_()).sum(), x)[0]

found = {"status": ck.list_backends()["triton"].reason}
if not found["status"]:
    found["difference"] = (gradient("triton") - gradient("eager")).abs().max().item()

class Block(torch.nn.Module):  # the official one
    def __init__(self):
        super().__init__()
        self.dwconv = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = torch.nn.LayerNorm(8)
        self.pwconv1, self.act, self.pwconv2 = torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)
        self.gamma, self.drop_path = torch.nn.Parameter(torch.ones(8)), torch.nn.Identity()
    def forward(self, x):
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)
found["accelerated"] = ck.acceleration_report(ck.accelerate(torch.nn.Sequential(Block()))).replaced

cache.remember("mlp", (8,), GPUS["H100"], "fused")
cache.forget()
found["remembered"] = cache.lookup("mlp", (8,), GPUS["H100"])

found["tuned"] = str(ck.tune(ck.LayerNorm2d(8), torch.randn(1, 8, 5, 3)))

checks.SHAPES, checks.WIDE, checks.KINDS = ((1, 8, 5, 3),), (), checks.KINDS[::5]
sys.argv = ["", "verify", "--only", "fp32", "--report", folder]
try:
    runpy.run_module("convnext_kernels", run_name="__main__")
except SystemExit as error:
    found["verify"] = error.code
print(json.dumps(found))
"""


def test_without_all_of_them_and_without_the_extension(run_python, tmp_path):
    hidden = [*OPTIONAL, "convnext_kernels._native"]
    # For the process that runs the checks too: Python imports this file when it starts.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    script = f"import sys\nsys.argv += {[str(tmp_path / 'verify'), *hidden]}\n{ALL_HIDDEN}"
    folder = {cache.ENVIRONMENT_VARIABLE: str(tmp_path / "cache")}
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    printed = run_python(script, TRITON_INTERPRET="1", PYTHONPATH=path, **folder)
    found = json.loads(printed.splitlines()[-1])
    assert found["verify"] in (None, 0, False)
    assert found["accelerated"] == 1
    assert found["remembered"] == "fused"
    assert "times faster than eager" in found["tuned"]
    assert found["status"] or found["difference"] < 1e-4
    (run,) = lines.read(tmp_path / "verify" / lines.FILE)
    assert run[-1]["complete"]
    done = lines.of_kind(run, "check")
    assert {check["candidate"] for check in done} == {"eager backend"} | ({"triton"} if not found["status"] else set())
    assert len(done) > 2
