"""Blocks against the official one: names, shapes, values, copies, drop path; layers against those of PyTorch."""

import copy

import pytest
import torch
from timm.layers import drop_path as timm_drop_path
from torch import nn

from convnext_kernels import DepthwiseConv2d, FusedConvNeXtBlock, FusedConvNeXtBlock1d
from convnext_kernels.nn import DepthwiseConv3d, DropPath, PatchDownsample2d
from convnext_kernels.variants import ACTIVATIONS, NORMS
from tests import reference
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


@pytest.mark.parametrize("channels_last", [False, True])
def test_over_time(channels_last):
    """Strides, inference and sequences; values and gradients on every backend: tests/ops/test_parts.py."""
    block = randomize_(FusedConvNeXtBlock1d(12, channels_last=channels_last))
    x = torch.randn((2, 17, 12) if channels_last else (2, 12, 17))
    y = block(x)
    assert y.stride() == x.stride()
    with torch.no_grad():
        assert torch.equal(block(x), y)
        assert torch.equal(nn.Sequential(block, block)(x), block(block(x)))


def test_downsampling_is_a_sequence_of_two():
    module = PatchDownsample2d(8, 12, 3, bias=False)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "0.weight": (8,),
        "0.bias": (8,),
        "1.weight": (12, 8, 3, 3),
    }
    x = torch.randn(1, 8, 7, 9)
    norm, conv = module
    torch.testing.assert_close(module(x), conv(reference.layer_norm2d(x, norm.weight, norm.bias)))


@pytest.mark.parametrize(
    ("ours", "kernel_size", "options", "padding"),
    [
        (DepthwiseConv2d, 5, {"dilation": 2}, (4, 4)),
        (DepthwiseConv2d, 3, {"stride": 2, "bias": False}, (1, 1)),
        (DepthwiseConv2d, (1, 11), {}, (0, 5)),
        (DepthwiseConv2d, (5, 3), {"stride": 2, "dilation": (1, 2)}, (2, 2)),
        (DepthwiseConv3d, 5, {"stride": 2}, (2, 2, 2)),
    ],
)
def test_depthwise_is_pytorchs_with_padding(ours, kernel_size, options, padding):
    """The same parameters, initialised alike, and results as the layer of PyTorch that keeps the size at stride 1."""
    kind = nn.Conv2d if ours is DepthwiseConv2d else nn.Conv3d
    torch.manual_seed(0)
    module = ours(6, kernel_size, **options)
    torch.manual_seed(0)
    plain = kind(6, 6, kernel_size, padding=padding, groups=6, **options)
    assert isinstance(module, kind)  # tools that look for one find it
    for attribute in ("groups", "padding", "dilation", "stride", "kernel_size", "padding_mode"):
        assert getattr(module, attribute) == getattr(plain, attribute)
    x = torch.randn(2, 6, 13, 8) if kind is nn.Conv2d else torch.randn(2, 6, 4, 5, 6)
    torch.testing.assert_close(module(x), plain(x))
    plain.load_state_dict(module.state_dict())


def test_drop_path():
    drop = DropPath(0.5)
    x = torch.ones(1000, 3, 1, 1)
    assert set(drop(x).unique().tolist()) == {0.0, 2.0}
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x
