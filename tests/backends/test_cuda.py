"""Asking for the CUDA kernels where they cannot run, and what they say of themselves."""

import importlib

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.backends import cuda
from convnext_kernels.backends.cuda import native


class Extension:
    """Stands in for the compiled extension on machines of all kinds."""

    HOST = False
    ARCHITECTURES = "75 90"
    TOOLKIT = "13.0"

    def __init__(self, driver: str = "", device: str = "") -> None:
        self.driver, self.device = driver, device

    def driver_problem(self) -> str:
        return self.driver

    def device_problem(self, device: int) -> str:
        return self.device


@pytest.fixture
def extension(monkeypatch):
    choices = importlib.import_module("convnext_kernels.dispatch")._able

    def install(loaded):
        monkeypatch.setattr(native, "_load", lambda: loaded)
        monkeypatch.setattr(cuda, "_device_problem", cuda._device_problem.__wrapped__)  # nothing remembered
        choices.cache_clear()

    yield install
    monkeypatch.undo()
    choices.cache_clear()


def test_without_a_driver(extension):
    extension(Extension(driver="CUDA driver version is insufficient (cudaErrorInsufficientDriver)"))
    reason = r"driver cannot run the kernels \(built for sm_75, sm_90\): .*cudaErrorInsufficientDriver"
    with pytest.raises(ck.BackendError, match=rf"backend 'cuda' is not available: .*{reason}"), ck.use_backend("cuda"):
        pass
    with pytest.raises(ck.BackendError, match=reason):
        ck.functional.depthwise_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="cuda")
    assert cuda.compiled()["driver"].startswith("CUDA driver version")


def test_not_built(extension):
    extension("this installation was built without the CUDA kernels")
    with pytest.raises(ck.BackendError, match="built without the CUDA kernels"), ck.use_backend("cuda"):
        pass
    assert not cuda.compiled()["built"]


def test_no_code_for_the_gpu(extension, monkeypatch):
    extension(Extension(device="no kernel image is available (cudaErrorNoKernelImageForDevice)"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert "no code for Tesla V100 (compute capability 7.0; built for sm_75, sm_90)" in cuda.unavailable()


def test_tensors_on_the_cpu_are_refused_by_the_real_extension(extension, monkeypatch):
    extension(Extension())
    monkeypatch.setattr(cuda, "_device_problem", lambda: None)
    with pytest.raises(ck.BackendError, match="tensors are on cpu, the CUDA kernels run on cuda"):
        ck.functional.depthwise_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="cuda")


def test_a_file_that_is_no_extension(run_python, tmp_path):
    """The variable for tests: what it names must load, and the reason says so when it does not."""
    (tmp_path / "broken.so").write_text("no machine code")
    script = "import convnext_kernels; print(convnext_kernels.list_backends()['cuda'].reason)"
    assert "cannot be imported" in run_python(script, **{native.EXTENSION_VARIABLE: str(tmp_path / "broken.so")})
