"""Layers against those of PyTorch that they stand for."""

import pytest
import torch
from torch import nn

from convnext_kernels import DepthwiseConv2d, LayerNorm2d
from convnext_kernels.nn import DepthwiseConv3d, DropPath, PatchDownsample2d
from tests import reference
from tests.tolerance import randomize_


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


def test_layer_norm_loads_from_nn_layer_norm():
    plain = randomize_(nn.LayerNorm(12, eps=1e-6))
    module = LayerNorm2d(12)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 3, 4)
    torch.testing.assert_close(module(x), plain(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_drop_path():
    drop = DropPath(0.5)
    x = torch.ones(1000, 3, 1, 1)
    assert set(drop(x).unique().tolist()) == {0.0, 2.0}
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x
