"""`FusedConvNeXtBlock` against the official block: names, shapes, values, copies, drop path."""

import copy

import pytest
import torch
from timm.layers import drop_path as timm_drop_path

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.variants import ACTIVATIONS, NORMS
from tests.interop.helpers import saved_and_loaded
from tests.interop.official import Block
from tests.shapes import TRITON, chosen
from tests.tolerance import randomize_

OPTIONS = {"v1": {}, "v2": {"use_grn": True}, "no layer scale": {"layer_scale_init_value": 0.0}}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_inner_modules_compute_what_the_op_does(norm, activation):
    """Nobody calls them, but they say what the block computes: in its repr, to hooks, to other tools."""
    block = randomize_(FusedConvNeXtBlock(12, norm=norm, activation=activation)).double()
    x = torch.randn(2, 12, 9, 8).double()
    y = block.norm(block.dwconv(x)).permute(0, 2, 3, 1)
    y = block.gamma * block.pwconv2(block.act(block.pwconv1(y)))
    torch.testing.assert_close(block(x), x + y.permute(0, 3, 1, 2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loads_official_weights(options):
    official = randomize_(Block(12, **options)).double()
    fused = FusedConvNeXtBlock(12, **options, dtype=torch.double)
    assert list(fused.state_dict()) == list(official.state_dict())
    fused.load_state_dict(official.state_dict())
    x = torch.randn(2, 12, 9, 8).double()
    torch.testing.assert_close(fused(x), official(x))


@chosen(lambda use_grn, copied, backend: backend != TRITON or (use_grn and copied is copy.deepcopy))
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies(copied, use_grn, backend):
    block = randomize_(FusedConvNeXtBlock(12, 0.1, use_grn=use_grn, eps=1e-5, backend=backend)).eval()
    x = torch.randn(2, 12, 5, 5)
    expected = block(x)  # before the copy, so that whatever a backend has cached is there
    clone = copied(block)
    assert torch.equal(clone(x), expected)
    with torch.no_grad():
        clone.pwconv1.weight.mul_(2)
    assert torch.equal(block(x), expected), "the copy shares weights with the original"
    assert not torch.equal(clone(x), expected), "the copy does not see its own weights"


@chosen(lambda backend: backend != TRITON)
def test_drop_path_draws_the_random_numbers_of_timm(backend):
    block = randomize_(FusedConvNeXtBlock(4, drop_path=0.3, backend=backend)).train()
    x = torch.randn(64, 4, 5, 5)
    branch = copy.deepcopy(block).eval()(x) - x
    torch.manual_seed(7)
    expected = x + timm_drop_path(branch, 0.3, training=True)
    after = torch.rand(1)
    torch.manual_seed(7)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.rand(1), after), "another number of random numbers was drawn"
