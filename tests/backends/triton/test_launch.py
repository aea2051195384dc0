"""Launches: where they are dependent, and that kernels then wait before anything else; loads through descriptors."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

from convnext_kernels import exporting
from convnext_kernels.calls import DwconvCall
from tests.backends.triton import interpreted

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from triton.runtime import _allocation

from convnext_kernels.backends import triton as backend
from convnext_kernels.backends.triton import dwconv, launch
from convnext_kernels.backends.triton.kernels import dependent, dwconv_forward
from convnext_kernels.backends.triton.kernels.dwconv_forward import rolling_kernel

SOURCES = sorted(Path(inspect.getfile(backend)).parent.rglob("*.py"))


def kernels():
    """(name, first statement) of every function with the parameter PDL."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "PDL" in [a.arg for a in node.args.args]:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                yield node.name, ast.unparse(body[0])


def test_kernels_wait_before_anything_else():
    found = dict(kernels())
    assert found.pop("wait_for_previous").splitlines() == ["if PDL:", "    gdc_wait()", "    gdc_launch_dependents()"]
    assert set(found.values()) == {"wait_for_previous(PDL)"}
    assert {"rolling_kernel", "rows_kernel", "plane_kernel", "mlp_fused_fwd_kernel", "mlp_project_kernel"} <= set(found)


@pytest.mark.parametrize(("arch", "used"), [(80, False), (89, False), (90, True), (120, True)])
def test_where(arch, used, monkeypatch):
    class Driver:
        def get_current_target(self):
            return type("Target", (), {"backend": "cuda", "arch": arch})

    monkeypatch.setattr(launch, "_INTERPRETED", False)
    name = "_active" if hasattr(launch.drivers, "_active") else "active"  # Triton 3.4
    monkeypatch.setattr(launch.drivers, name, Driver())
    options = {"PDL": True, "launch_pdl": True} if used else {"PDL": False}
    assert launch._dependent(rolling_kernel) == options
    assert launch._dependent(dependent.wait_for_previous) == options
    assert launch._dependent(dwconv_forward.load_two) == {}


@interpreted
def test_not_in_the_interpreter():
    x = torch.randn(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2, 1, 1, 1)
    torch.testing.assert_close(dwconv.forward(DwconvCall(x, weight, None, (1, 1), 1, x.dtype)), x * weight[:, 0])
    assert launch._dependent(rolling_kernel) == {"PDL": False}


TILE = {"BM": 64, "TMA": 1}


def test_what_may_be_loaded(monkeypatch):
    """Through tensor descriptors."""
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
