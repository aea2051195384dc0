import importlib.metadata
import json
import warnings

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
    assert list(values["backends"]) == list(ck.list_backends())
    for name, status in ck.list_backends().items():
        shown = values["backends"][name]
        assert shown == {
            "available": status.available,
            "reason": status.reason,
            "description": status.description,
        }
    assert values["environment"]["CONVNEXT_KERNELS_CPU_ISA"] == "avx2"
    assert values["environment"]["CONVNEXT_KERNELS_BACKEND"] is None
    assert values["threads"]["torch"] == torch.get_num_threads()
    assert values["cpu"]["name"]
    assert values["commit"] == environment.commit()
    assert values["torch_built_for"] == {"cuda": torch.version.cuda, "hip": torch.version.hip}
    assert bool(values["gpus"]) != bool(values["no_gpu_reason"])


def test_variables_that_are_set_are_shown(run, monkeypatch):
    monkeypatch.setenv("CNK_CUDA_ARCHITECTURES", "80 90")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("SECRET", "hidden")
    values = json.loads(run("info", "--json").stdout)["environment"]
    assert values["CNK_CUDA_ARCHITECTURES"] == "80 90"
    assert values["TRITON_CACHE_DIR"] == "/somewhere"
    assert "SECRET" not in values


def test_how_a_wheel_was_built(run, monkeypatch, tmp_path):
    """A wheel has a file about its build; in a checkout git answers for the commit."""
    package = tmp_path / "environment.py"
    (tmp_path / "built.json").write_text('{"commit": "0123456789ab", "python": "3.11.7", "pure_python": "no compiler"}')
    monkeypatch.setattr(environment, "__file__", str(package))
    shown = " ".join(run("info").output.replace("│", " ").split())
    for words in ("commit 0123456789ab", "built by Python 3.11.7", "without compiled kernels: no compiler"):
        assert words in shown


@pytest.mark.parametrize(("status", "expected"), [(0, "550.54.14"), (9, None)])
def test_driver(monkeypatch, tmp_path, status, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 550.54.14\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.driver() == expected


def test_cpu_features(monkeypatch):
    for text, expected in (
        ("processor : 0\nflags : fpu fma avx2 avx512_bf16 sse2\n", ["avx2", "avx512_bf16", "fma"]),
        ("Features : fp asimd asimdhp bf16 sve2\n", ["asimd", "asimdhp", "bf16", "sve2"]),
    ):
        monkeypatch.setattr(environment.Path, "read_text", lambda self, text=text, **kwargs: text)
        assert environment.cpu_features() == expected


def test_table_shows_backends_and_missing_libraries(run, monkeypatch):
    def version(library):
        if library == "triton":
            raise importlib.metadata.PackageNotFoundError(library)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = run("info")
    assert result.exit_code == 0, result.output
    assert any("triton" in line and "not installed" in line for line in result.output.splitlines())
    for name in ck.list_backends():
        assert name in result.output


@pytest.mark.parametrize(
    ("compiled", "words"),
    [
        ({"built": False, "reason": "no nvcc"}, "not built: no nvcc"),
        ({"built": True, "architectures": []}, "built for the CPU"),
        (
            {"built": True, "architectures": ["80", "90"], "toolkit": "13.0", "driver": "no device"},
            "CUDA 13.0, sm_80, sm_90 and PTX for sm_90; the driver cannot run them: no device",
        ),
        ({"built": True, "architectures": ["75"], "toolkit": "13.0", "driver": ""}, "the driver can run them"),
    ],
)
def test_what_the_cuda_extension_holds(run, monkeypatch, compiled, words):
    from convnext_kernels import dispatch

    monkeypatch.setattr(dispatch, "compiled_for_cuda", lambda: compiled)
    assert words in " ".join(run("info").output.replace("│", " ").split())
    assert json.loads(run("info", "--json").stdout)["cuda_extension"] == compiled


def test_gpu_reasons(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without" in environment.gpus()[1]

    def warns():
        warnings.warn("old driver", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", warns)
    found, reason = environment.gpus()
    assert found == []
    assert "13.0" in reason
    assert "old driver" in reason


@pytest.mark.parametrize("command", ["demo", "bench", "verify"])
def test_cuda_asked_for_where_there_is_none(fails, monkeypatch, command):
    monkeypatch.setattr(environment, "gpus", lambda: ([], "no driver"))
    code = 2 if command == "verify" else 1
    fails(command, "--device", "cuda", words=("--device cuda", "no driver"), code=code)
