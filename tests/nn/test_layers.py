"""`DepthwiseConv2d`, `LayerNorm2d`, `GlobalResponseNorm` against the layers they stand for."""

import pytest
import torch
from torch import nn

from convnext_kernels import DepthwiseConv2d, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.nn import DropPath, PatchDownsample2d
from tests import reference
from tests.tolerance import randomize_


def test_global_response_norm(backend):
    module = randomize_(GlobalResponseNorm(12, 1e-5, backend=backend))
    x = torch.randn(2, 12, 9, 8)
    expected = reference.global_response_norm(x, *(p.flatten() for p in (module.gamma, module.beta)), eps=1e-5)
    torch.testing.assert_close(module(x), expected)


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
    ("kernel_size", "options", "padding"),
    [
        (5, {"dilation": 2}, (4, 4)),
        (3, {"stride": 2, "bias": False}, (1, 1)),
        ((1, 11), {}, (0, 5)),
        ((5, 3), {"stride": 2, "dilation": (1, 2)}, (2, 2)),
    ],
)
def test_depthwise_is_pytorchs_with_padding(kernel_size, options, padding):
    """The same parameters and results as the layer of PyTorch that keeps the size at stride 1."""
    module = DepthwiseConv2d(6, kernel_size, **options)
    plain = nn.Conv2d(6, 6, kernel_size, padding=padding, groups=6, **options)
    plain.load_state_dict(module.state_dict())
    assert isinstance(module, nn.Conv2d)  # tools that look for one find it
    for attribute in ("groups", "padding", "dilation", "stride", "kernel_size", "padding_mode"):
        assert getattr(module, attribute) == getattr(plain, attribute)
    x = torch.randn(2, 6, 13, 8)
    torch.testing.assert_close(module(x), plain(x))


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
