"""benchmarks/cpu_sweep.py and cpu_phases.py: what they cover, what they measure, and that wrong results are noticed."""

import pytest
import torch

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.mlp_native import PHASES, timed_phases
from convnext_kernels.nn import DepthwiseConv2d, FusedConvNeXtBlock

pytestmark = pytest.mark.skipif(native.import_error() is not None, reason="the CPU kernels are not built")


@pytest.fixture
def sweep(program):
    return program("cpu_sweep")


def test_no_speed_of_wrong_numbers(sweep, monkeypatch):
    forward = DepthwiseConv2d.forward
    monkeypatch.setattr(DepthwiseConv2d, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(AssertionError, match=r"dwconv 1x8x5x5 K3: differs from eager"):
        sweep.measure(sweep.Shape("dwconv", 1, 8, 5, 5, 3), torch.float32, 1)


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_phases_of_a_block(use_grn):
    block = FusedConvNeXtBlock(32, use_grn=use_grn, backend="cpu")
    x = torch.randn(1, 32, 40, 40)
    with torch.no_grad():
        plain = block(x)
        with timed_phases() as seconds:
            assert torch.equal(block(x), plain)
        measured = seconds.clone()
        block(x)
    assert seconds.shape == (torch.get_num_threads(), len(PHASES))
    total = dict(zip(PHASES, measured.sum(0).tolist(), strict=True))
    assert all(total[name] > 0 for name in ("dwconv", "LayerNorm", "W1, GELU", "W2, residual"))
    assert (total["GRN"] > 0) == use_grn
    assert torch.equal(seconds, measured), "calls outside were timed too"
