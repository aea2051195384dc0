import importlib.metadata
import json

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import environment


def test_json_holds_everything(run, monkeypatch):
    monkeypatch.setenv("CONVNEXT_KERNELS_CPU_ISA", "avx2")
    monkeypatch.delenv("CONVNEXT_KERNELS_BACKEND", raising=False)
    result = run("info", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["convnext_kernels"] == ck.__version__
    assert values["libraries"]["torch"] == importlib.metadata.version("torch")
    for name, status in ck.list_backends().items():
        assert values["backends"][name]["reason"] == status.reason
    assert values["environment"]["CONVNEXT_KERNELS_CPU_ISA"] == "avx2"
    assert values["environment"]["CONVNEXT_KERNELS_BACKEND"] is None
    assert values["threads"]["torch"] == torch.get_num_threads()
    assert values["commit"] == environment.commit()
    assert bool(values["gpus"]) != bool(values["no_gpu_reason"])


def test_how_a_wheel_was_built(run, monkeypatch, tmp_path):
    """A wheel has a file about its build; in a checkout git answers for the commit."""
    package = tmp_path / "environment.py"
    (tmp_path / "built.json").write_text('{"commit": "0123456789ab", "python": "3.11.7", "pure_python": "no compiler"}')
    monkeypatch.setattr(environment, "__file__", str(package))
    shown = " ".join(run("info").output.replace("│", " ").split())
    for words in ("commit 0123456789ab", "built by Python 3.11.7", "without compiled kernels: no compiler"):
        assert words in shown


@pytest.mark.parametrize("command", ["demo", "bench", "verify"])
def test_cuda_asked_for_where_there_is_none(fails, monkeypatch, command):
    monkeypatch.setattr(environment, "gpus", lambda: ([], "no driver"))
    code = 2 if command == "verify" else 1
    fails(command, "--device", "cuda", words=("--device cuda", "no driver"), code=code)
