"""`DepthwiseConv2d`, `LayerNorm2d`, `GlobalResponseNorm` against the layers they stand for."""

import pytest
import torch
from torch import nn

from convnext_kernels import DepthwiseConv2d, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.nn import DropPath, PatchDownsample2d
from tests import reference
from tests.tolerance import randomize_

MODULES = {
    "DepthwiseConv2d": lambda **k: DepthwiseConv2d(12, 5, dilation=2, **k),
    "DepthwiseConv2d without bias": lambda **k: DepthwiseConv2d(12, bias=False, **k),
    "LayerNorm2d": lambda **k: LayerNorm2d(12, 1e-5, **k),
    "GlobalResponseNorm": lambda **k: GlobalResponseNorm(12, 1e-5, **k),
    "PatchDownsample2d": lambda **k: PatchDownsample2d(12, 20, eps=1e-5, **k),
}


def official(name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if name == "LayerNorm2d":
        return reference.layer_norm2d(x, module.weight, module.bias, eps=1e-5)
    if name == "GlobalResponseNorm":
        return reference.global_response_norm(x, *(p.flatten() for p in (module.gamma, module.beta)), eps=1e-5)
    if name == "PatchDownsample2d":
        norm, conv = module
        return conv(reference.layer_norm2d(x, norm.weight, norm.bias, eps=1e-5))
    dilation = 1 if "without" in name else 2
    return reference.depthwise_conv2d(x, module.weight, module.bias, dilation=dilation)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_values(name, memory_format, backend):
    module = randomize_(MODULES[name](backend=backend))
    x = torch.randn(2, 12, 9, 8).contiguous(memory_format=memory_format)
    y = module(x)
    torch.testing.assert_close(y, official(name, module, x))
    assert y.is_contiguous(memory_format=memory_format)


def test_depthwise_conv_is_a_conv():
    """Tools that look for nn.Conv2d find one, with the right attributes and state dict."""
    module = DepthwiseConv2d(12, 5, dilation=2)
    plain = nn.Conv2d(12, 12, 5, padding=4, dilation=2, groups=12)
    assert isinstance(module, nn.Conv2d)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    for attribute in ("groups", "padding", "dilation", "stride", "kernel_size", "padding_mode"):
        assert getattr(module, attribute) == getattr(plain, attribute)


def test_downsampling_is_a_sequence_of_two():
    module = PatchDownsample2d(8, 12, 3, bias=False)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "0.weight": (8,),
        "0.bias": (8,),
        "1.weight": (12, 8, 3, 3),
    }
    assert module(torch.randn(1, 8, 7, 9)).shape == (1, 12, 2, 3)


@pytest.mark.parametrize(
    ("kernel_size", "options", "padding"),
    [
        (3, {"stride": 2}, (1, 1)),
        ((1, 11), {}, (0, 5)),
        ((5, 3), {"stride": 2, "dilation": (1, 2)}, (2, 2)),
    ],
)
def test_depthwise_is_pytorchs_with_padding(kernel_size, options, padding):
    """The same parameters and results as the layer of PyTorch that keeps the size at stride 1."""
    module = DepthwiseConv2d(6, kernel_size, **options)
    plain = nn.Conv2d(6, 6, kernel_size, padding=padding, groups=6, **options)
    plain.load_state_dict(module.state_dict())
    assert (module.padding, module.stride, module.dilation) == (plain.padding, plain.stride, plain.dilation)
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
