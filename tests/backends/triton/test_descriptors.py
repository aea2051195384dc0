"""Loads through tensor descriptors: when they are allowed, and the memory of the descriptors, also when replayed."""

import pytest
import torch

from convnext_kernels import exporting

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from triton.runtime import _allocation

from convnext_kernels.backends.triton import launch

TILE = {"BM": 64, "TMA": 1}


def test_what_may_be_loaded(monkeypatch):
    x = torch.empty(33, dtype=torch.bfloat16)
    assert launch.loadable(TILE, x[:32], x[8:]) == TILE
    for tensors in ((x[1:],), (x, x[4:]), (x, x.float())):
        assert launch.loadable(TILE, *tensors) == TILE | {"TMA": 0}
    monkeypatch.setattr(exporting, "traces_launches", lambda: True)
    assert launch.loadable(TILE, x) == TILE | {"TMA": 0}


@pytest.mark.skipif(not hasattr(_allocation._allocator, "get"), reason="Triton 3.4 has one allocator for the process")
def test_memory_of_descriptors():
    """A launch finds an allocator, and the caller's is as it was."""
    before = _allocation._allocator.get()

    def launcher(size, *, stream):
        return _allocation._allocator.get()(size, 128, stream)

    memory = launch._with_scratch(launcher)(256, stream=None)
    assert memory.nbytes == 256
    assert _allocation._allocator.get() is before
