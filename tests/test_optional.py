"""What works without the packages that are nice to have, and what is said about the missing one.

Nothing imports them before they are used (tests/test_layering.py, tests/test_import.py), so a process hides them all.
"""

import json
import os
from pathlib import Path

from convnext_kernels.bench import lines
from convnext_kernels.tuning import cache

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("platformdirs", "filelock", "rich", "click", "jinja2", "matplotlib", "psutil")
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

found = {"status": ck.list_backends()["triton"].reason, "cpu": ck.list_backends()["cpu"].reason}
try:
    gradient("cpu")
except ck.BackendError as error:
    found["refusal"] = str(error)
with ck.use_backend("eager"):
    found["same"] = torch.equal(gradient("auto"), gradient("eager"))
if not found["status"]:
    found["difference"] = (gradient("triton") - gradient("eager")).abs().max().item()

conv = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
found["accelerated"] = ck.acceleration_report(ck.accelerate(torch.nn.Sequential(conv))).replaced

cache.keep({cache.key("mlp", (8,), GPUS["H100"]): "fused"})
cache.forget()
found["remembered"] = cache.lookup("mlp", (8,), GPUS["H100"])

found["tuned"] = str(ck.tune(ck.LayerNorm2d(8), torch.randn(1, 8, 5, 3)))

checks.SHAPES, checks.WIDE, checks.KINDS = ((1, 8, 5, 3),), (), checks.KINDS[::10]
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
    assert "without the CPU kernels" in found["cpu"]
    assert found["cpu"] in found["refusal"]
    assert found["same"]
    assert found["accelerated"] == 1
    assert found["remembered"] == "fused"
    assert "times faster than eager" in found["tuned"]
    assert found["status"] or found["difference"] < 1e-4
    (run,) = lines.read(tmp_path / "verify" / lines.FILE)
    assert run[-1]["complete"]
    assert "psutil is not installed" in json.dumps(run)
    done = lines.of_kind(run, "check")
    assert {check["candidate"] for check in done} == {"eager backend"} | ({"triton"} if not found["status"] else set())
    assert len(done) > 2
