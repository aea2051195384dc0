"""The native backend's instruction sets: which there are, and who decides."""

import sys
from types import ModuleType

import pytest
import torch

from convnext_kernels import BackendError, FusedConvNeXtBlock, dispatch
from convnext_kernels.backends.cpu import native
from tests.tolerance import randomize_

cpu = pytest.importorskip("convnext_kernels.backends.cpu")
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native backend: {cpu.unavailable()}")


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment variable, which is read once."""

    def put(value: str) -> None:
        monkeypatch.setenv(cpu.ISA_VARIABLE, value)
        native.requested.cache_clear()

    yield put
    monkeypatch.undo()
    native.requested.cache_clear()


def test_use_isa(environment):
    environment("")
    best = cpu.supported_isas()[-1]
    assert cpu.isa() == best
    for isa in cpu.supported_isas():
        with cpu.use_isa(isa):
            assert cpu.isa() == isa
            assert isa in dispatch.list_backends()["cpu"].description
    assert cpu.isa() == best


def test_environment(environment):
    environment("portable")
    assert cpu.isa() == "portable"
    with cpu.use_isa(cpu.supported_isas()[-1]):
        assert cpu.isa() == cpu.supported_isas()[-1]
    environment("sse9")
    with pytest.raises(BackendError, match=r"CONVNEXT_KERNELS_CPU_ISA: .*portable.*got 'sse9'"):
        FusedConvNeXtBlock(4, backend="cpu")(torch.randn(1, 4, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switching_back_and_forth(dtype):
    """Weights packed for one level are not read by another."""
    block = randomize_(FusedConvNeXtBlock(40, backend="cpu")).to(dtype)
    x = torch.randn(2, 40, 9, 8).to(dtype)
    first = {}
    for _ in range(3):
        for isa in cpu.supported_isas():
            with cpu.use_isa(isa), torch.no_grad():
                y = block(x)
            assert torch.equal(first.setdefault(isa, y), y), isa


def test_an_extension_older_than_the_package_is_refused(monkeypatch):
    """In an editable installation the sources can be newer than what was compiled."""
    old = ModuleType("convnext_kernels._native")
    old.__file__ = "/somewhere/_native.so"
    monkeypatch.setitem(sys.modules, old.__name__, old)
    reason = native._load.__wrapped__()
    assert "/somewhere/_native.so is older than this package: install the package again" in reason
