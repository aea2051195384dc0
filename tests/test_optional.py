"""What works without the packages that are nice to have, and what is said about the missing one.

Nothing imports them before they are used (tests/test_layering.py, tests/test_import.py), so one process hides each in
turn, and a fresh one all together.
"""

import json
import sys
from contextlib import nullcontext

import pytest

import convnext_kernels as ck
from convnext_kernels import __main__ as entry
from convnext_kernels.bench import ceilings, checks, conditions, report, results
from convnext_kernels.tuning import cache

OPTIONAL = ("platformdirs", "filelock", "rich", "click", "jinja2", "matplotlib", "psutil")
KINDS = tuple(kind for kind in checks.KINDS if kind[:2] in (("layernorm", ""), ("block", " V2")))


@pytest.fixture
def hide(monkeypatch):
    """``hide(name)``: an import of that package raises ModuleNotFoundError, also of its modules loaded before."""

    def hidden(name: str) -> None:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return hidden


@pytest.fixture
def verify(monkeypatch, tmp_path, capsys):
    """Run ``python -m convnext_kernels verify`` with few checks in this process: (exit code, run, what it printed)."""
    monkeypatch.setattr(checks, "SHAPES", ((1, 8, 5, 3),))
    monkeypatch.setattr(checks, "WIDE", ())
    monkeypatch.setattr(checks, "KINDS", KINDS)
    monkeypatch.setattr(ceilings, "SECONDS", 0.001)
    monkeypatch.setattr(checks, "backends", lambda device: ([("eager", nullcontext)], []))
    monkeypatch.setattr("convnext_kernels.bench.verify.DTYPES", ("fp32",))
    monkeypatch.setattr("convnext_kernels.cli.bench.select", lambda *_: [])
    monkeypatch.setattr("convnext_kernels.cli.verify.select", lambda *_: [])

    def run(*arguments: str) -> tuple[int, results.Run, str]:
        monkeypatch.setattr(sys, "argv", ["", "verify", "--device", "cpu", "--report", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as exit_:
            entry.main()
        printed = capsys.readouterr()
        return exit_.value.code, results.load(tmp_path / results.FILE), printed.out + printed.err

    return run


@pytest.mark.parametrize("name", OPTIONAL)
def test_verify_without(name, hide, verify, tmp_path):
    hide(name)
    code, run, printed = verify()
    assert code in (None, 0), printed
    assert run.complete
    assert len(run.checks) == len(KINDS)
    assert f"{len(run.checks)} numerical checks passed on cpu." in printed
    assert (tmp_path / report.NAME).exists() == (name not in ("jinja2", "matplotlib"))
    said = " ".join(printed.split())
    if name in ("jinja2", "matplotlib"):
        assert f'the report needs {name}, which is not installed: pip install "convnext-kernels[bench]"' in said
    if name in ("click", "rich"):
        assert "not run: the benchmark, which needs click and rich: pip install click rich" in said
    if name == "psutil":
        assert 'not run: the benchmark, which needs psutil: pip install "convnext-kernels[bench]"' in said
        assert "the load of the machine is unknown: psutil is not installed" in said


def test_plain_verify_fails_for_a_broken_kernel(hide, verify, monkeypatch):
    hide("rich")
    forward = ck.FusedConvNeXtBlock.forward
    monkeypatch.setattr(ck.FusedConvNeXtBlock, "forward", lambda self, x: forward(self, x) * 1.1)
    code, _, printed = verify()
    assert code == 1
    assert "block 1x8x5x3 V2 fp32 on eager: wrong" in printed
    assert "numerical checks failed" in printed


def test_plain_verify_keeps_the_results_when_interrupted(hide, verify, monkeypatch):
    hide("click")
    everything = checks.run

    def interrupted(*arguments):
        found = everything(*arguments)
        yield next(found)
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "run", interrupted)
    code, run, printed = verify()
    assert code == 130
    assert len(run.checks) == 1
    assert not run.complete
    assert "Interrupted" in printed


@pytest.mark.parametrize("name", ["click", "rich"])
def test_other_commands_say_what_is_missing(name, hide, monkeypatch):
    hide(name)
    monkeypatch.setattr(sys, "argv", ["", "info"])
    with pytest.raises(SystemExit, match=f"Error: .*{name} .*pip install {name}"):
        entry.main()


def test_figures_of_the_load_need_psutil(hide):
    assert not any("psutil" in line for line in conditions.collect("cpu")["warnings"])
    hide("psutil")
    found = conditions.collect("cpu")
    assert any("psutil is not installed (pip install psutil)" in line for line in found["warnings"])
    assert "MHz" not in found["clocks"]


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
sys.argv = ["", "verify", "--report", folder]
try:
    runpy.run_module("convnext_kernels", run_name="__main__")
except SystemExit as error:
    found["verify"] = error.code
print(json.dumps(found))
"""


def test_without_all_of_them_and_without_the_extension(run_python, tmp_path):
    arguments = [str(tmp_path / "verify"), *OPTIONAL, "convnext_kernels._native"]
    script = f"import sys\nsys.argv += {arguments}\n{ALL_HIDDEN}"
    printed = run_python(script, TRITON_INTERPRET="1", **{cache.ENVIRONMENT_VARIABLE: str(tmp_path / "cache")})
    found = json.loads(printed.splitlines()[-1])
    assert found["verify"] in (None, 0, False)
    assert found["accelerated"] == 1
    assert found["remembered"] == "fused"
    assert "times faster than eager" in found["tuned"]
    assert found["status"] or found["difference"] < 1e-4
    run = results.load(tmp_path / "verify" / results.FILE)
    assert run.complete
    assert {check.backend for check in run.checks} >= {"eager"} | ({"triton"} if not found["status"] else set())
