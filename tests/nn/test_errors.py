"""Bad arguments of the modules: the exception's type, and that the message names argument, value and expectation."""

import math

import pytest
import torch

from convnext_kernels import BackendError, DepthwiseConv2d, FusedConvNeXtBlock, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.models import create_model
from convnext_kernels.nn import PatchDownsample2d

INTEGER = "an integer of at least 1"
KERNEL = "odd kernel sizes from 1 to 51"
EPS = "a finite number of at least 0"
PROBABILITY = "a probability from 0 up to but not including 1"

# module, arguments, exception, what the message must say: argument, expectation, value
TABLE = [
    *(
        (module, {name: value}, error, (name, INTEGER, repr(value)))
        for module, name in (
            (FusedConvNeXtBlock, "dim"),
            (DepthwiseConv2d, "channels"),
            (LayerNorm2d, "channels"),
            (GlobalResponseNorm, "channels"),
        )
        for value, error in ((0, ValueError), (-8, ValueError), (8.0, TypeError), ("8", TypeError), (None, TypeError))
    ),
    (FusedConvNeXtBlock, {"dim": True}, TypeError, ("dim", INTEGER, "True")),
    *(
        (FusedConvNeXtBlock, {"dim": 8, name: value}, error, (name, INTEGER, repr(value)))
        for name in ("mlp_ratio", "dilation")
        for value, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError))
    ),
    (DepthwiseConv2d, {"channels": 8, "dilation": 0}, ValueError, ("dilation", INTEGER, "0")),
    *(
        (module, {first: 8, "kernel_size": value}, error, ("kernel_size", wanted, repr(value)))
        for module, first in ((FusedConvNeXtBlock, "dim"), (DepthwiseConv2d, "channels"))
        for value, error, wanted in (
            (4, ValueError, KERNEL),
            (53, ValueError, KERNEL),
            (0, ValueError, INTEGER),
            (-7, ValueError, INTEGER),
            (7.0, TypeError, INTEGER),
        )
    ),
    (FusedConvNeXtBlock, {"dim": 8, "kernel_size": (3, 4)}, ValueError, ("kernel_size", KERNEL, "3x4")),
    (DepthwiseConv2d, {"channels": 8, "kernel_size": (3, 4)}, ValueError, ("kernel_size", KERNEL, "3x4")),
    (DepthwiseConv2d, {"channels": 8, "kernel_size": (3, 5.0)}, TypeError, ("kernel_size", INTEGER, "5.0")),
    (
        DepthwiseConv2d,
        {"channels": 8, "kernel_size": (3, 5, 7)},
        ValueError,
        ("kernel_size", "one integer or two, for height and width", "(3, 5, 7)"),
    ),
    (DepthwiseConv2d, {"channels": 8, "stride": 3}, ValueError, ("stride", "1 or 2", "3")),
    *(
        (module, {first: 8, "eps": value}, ValueError, ("eps", EPS, str(value)))
        for module, first in (
            (FusedConvNeXtBlock, "dim"),
            (LayerNorm2d, "channels"),
            (GlobalResponseNorm, "channels"),
        )
        for value in (-1e-6, math.nan, math.inf)
    ),
    *(
        (FusedConvNeXtBlock, {"dim": 8, name: value}, error, (name, wanted, repr(value)))
        for name, choices in (
            ("norm", "'layer', 'rms', 'simple'"),
            ("activation", "'gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'mish', 'relu', 'relu6', 'hardswish'"),
        )
        for value, error, wanted in (
            ("batch", ValueError, f"one of {choices}"),
            ("GELU", ValueError, f"one of {choices}"),
            (None, TypeError, "a string"),
            (torch.nn.functional.gelu, TypeError, "a string"),
        )
    ),
    *(
        (module, {"channels": 8, "out_channels": 8, name: 0}, ValueError, (name, INTEGER, "0"))
        for module in (PatchDownsample2d,)
        for name in ("channels", "out_channels", "kernel_size")
    ),
    (DepthwiseConv2d, {"channels": 8, "stride": 0}, ValueError, ("stride", INTEGER, "0")),
    (LayerNorm2d, {"channels": 8, "eps": None}, TypeError, ("eps", "a number", "None")),
    (FusedConvNeXtBlock, {"dim": 8, "eps": "1e-6"}, TypeError, ("eps", "a number", "'1e-6'")),
    *(
        (FusedConvNeXtBlock, {"dim": 8, "drop_path": value}, ValueError, ("drop_path", PROBABILITY, str(value)))
        for value in (-0.1, 1, 1.5, math.nan, math.inf)
    ),
    *(
        (FusedConvNeXtBlock, {"dim": 8, "drop_path": value}, TypeError, ("drop_path", "a number", repr(value)))
        for value in ("0.1", None, [0.1])
    ),
    (
        FusedConvNeXtBlock,
        {"dim": 8, "layer_scale_init_value": math.nan},
        ValueError,
        ("layer_scale_init_value", "a finite number", "nan"),
    ),
    (
        FusedConvNeXtBlock,
        {"dim": 8, "layer_scale_init_value": None},
        TypeError,
        ("layer_scale_init_value", "a number", "None"),
    ),
]


@pytest.mark.parametrize(("module", "arguments", "error", "fragments"), TABLE)
def test_constructor(module, arguments, error, fragments):
    name, expected, value = fragments
    with pytest.raises(error) as caught:
        module(**arguments)
    assert str(caught.value) == f"{name}: expected {expected}, got {value}"


MODULES = {
    "FusedConvNeXtBlock": FusedConvNeXtBlock,
    "DepthwiseConv2d": DepthwiseConv2d,
    "LayerNorm2d": LayerNorm2d,
    "GlobalResponseNorm": GlobalResponseNorm,
    "PatchDownsample2d": lambda channels, **k: PatchDownsample2d(channels, 12, **k),
}


@pytest.mark.parametrize("name", MODULES)
def test_input(name):
    module = MODULES[name](8)
    for x, error, message in (
        (torch.zeros(8, 4, 4), ValueError, r"^x: expected 4 dimensions \(N, C, H, W\), got 3"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.int64), TypeError, r"^x: expected float32.*got torch.int64"),
        (torch.zeros(1, 7, 4, 4), ValueError, r"weight: expected .*7.*got (8|\(8, 1, 7, 7\))"),
        (torch.zeros(1, 8, 4, 4).half(), TypeError, r"weight: expected x's dtype torch.float16, got torch.float32"),
        (torch.zeros(1, 8, 4, 4, device="meta"), ValueError, r"weight: expected a tensor on x's device meta"),
    ):
        with pytest.raises(error, match=message):
            module(x)


@pytest.mark.parametrize("x", [[[1.0]], None, 3, "image"], ids=repr)
@pytest.mark.parametrize("name", MODULES)
def test_input_that_is_no_tensor(name, x):
    with pytest.raises((RuntimeError, TypeError), match=r"(argument 'x'|x: expected a tensor)"):
        MODULES[name](8)(x)


def test_input_that_is_no_tensor_with_drop_path():
    """Drop path looks at x before the op does."""
    with pytest.raises(TypeError, match=r"x: expected a tensor, got list"):
        FusedConvNeXtBlock(8, drop_path=0.5)([1.0])


@pytest.mark.parametrize("name", MODULES)
def test_unknown_backend(name):
    message = r"^backend: unknown backend 'fpga', expected one of auto, .*eager$"
    with pytest.raises(ValueError, match=message) as caught:
        MODULES[name](8, backend="fpga")
    assert isinstance(caught.value, BackendError), "what a call raises for it"
    with pytest.raises(TypeError, match=r"^backend: expected the name of a backend \(str\), got NoneType$"):
        MODULES[name](8, backend=None)


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_isotropic_small"])
def test_unknown_backend_of_a_model(name):
    with pytest.raises(ValueError, match=r"^backend: unknown backend 'fpga'"):
        create_model(name, backend="fpga")
