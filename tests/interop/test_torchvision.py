"""torchvision's stochastic depth, of rows and of whole batches."""

import copy

import pytest
import torch
from torchvision.models.convnext import CNBlock
from torchvision.ops import StochasticDepth

import convnext_kernels as ck
from tests.interop.helpers import assert_same, fused_calls
from tests.tolerance import randomize_


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_stochastic_depth(mode, p):
    original = randomize_(CNBlock(8, 1.0, 0.0)).double()
    original.stochastic_depth = StochasticDepth(p, mode)
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(16, 8, 5, 5).double()
    assert_same(accelerated, original, x)
    assert fused_calls(lambda: accelerated(x)) == {"block": 1}
    if p == 1.0:
        assert torch.equal(accelerated(x), x)
