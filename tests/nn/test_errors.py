"""Bad arguments of the modules: the exception's type, and that the message names argument, value and expectation."""

import math

import pytest

from convnext_kernels import BackendError, DepthwiseConv2d, FusedConvNeXtBlock, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.models import create_model
from convnext_kernels.nn import PatchDownsample2d

NORMS = "'layer', 'rms', 'simple'"
ACTIVATIONS = "'gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'mish', 'relu', 'relu6', 'hardswish'"
INTEGER = "an integer of at least 1"
KERNEL = "odd kernel sizes from 1 to 51"
EPS = "a finite number of at least 0"
PROBABILITY = "a probability from 0 up to but not including 1"

# module, arguments, exception, what the message must say: argument, expectation, value
TABLE = [
    (FusedConvNeXtBlock, {"dim": 0}, ValueError, ("dim", INTEGER, "0")),
    (FusedConvNeXtBlock, {"dim": True}, TypeError, ("dim", INTEGER, "True")),
    (DepthwiseConv2d, {"channels": -8}, ValueError, ("channels", INTEGER, "-8")),
    (LayerNorm2d, {"channels": "8"}, TypeError, ("channels", INTEGER, "'8'")),
    (GlobalResponseNorm, {"channels": 8.0}, TypeError, ("channels", INTEGER, "8.0")),
    *(
        (PatchDownsample2d, {"channels": 8, "out_channels": 8, name: 0}, ValueError, (name, INTEGER, "0"))
        for name in ("channels", "out_channels", "kernel_size")
    ),
    (FusedConvNeXtBlock, {"dim": 8, "mlp_ratio": 2.5}, TypeError, ("mlp_ratio", INTEGER, "2.5")),
    (FusedConvNeXtBlock, {"dim": 8, "dilation": -1}, ValueError, ("dilation", INTEGER, "-1")),
    (DepthwiseConv2d, {"channels": 8, "dilation": 0}, ValueError, ("dilation", INTEGER, "0")),
    (FusedConvNeXtBlock, {"dim": 8, "kernel_size": 4}, ValueError, ("kernel_size", KERNEL, "4")),
    (FusedConvNeXtBlock, {"dim": 8, "kernel_size": (3, 4)}, ValueError, ("kernel_size", KERNEL, "3x4")),
    (DepthwiseConv2d, {"channels": 8, "kernel_size": 53}, ValueError, ("kernel_size", KERNEL, "53")),
    (DepthwiseConv2d, {"channels": 8, "kernel_size": (3, 5.0)}, TypeError, ("kernel_size", INTEGER, "5.0")),
    (
        DepthwiseConv2d,
        {"channels": 8, "kernel_size": (3, 5, 7)},
        ValueError,
        ("kernel_size", "one integer or two, for height and width", "(3, 5, 7)"),
    ),
    (DepthwiseConv2d, {"channels": 8, "stride": 3}, ValueError, ("stride", "1 or 2", "3")),
    (FusedConvNeXtBlock, {"dim": 8, "eps": "1e-6"}, TypeError, ("eps", "a number", "'1e-6'")),
    (LayerNorm2d, {"channels": 8, "eps": -1e-6}, ValueError, ("eps", EPS, "-1e-06")),
    (GlobalResponseNorm, {"channels": 8, "eps": math.nan}, ValueError, ("eps", EPS, "nan")),
    (FusedConvNeXtBlock, {"dim": 8, "norm": "batch"}, ValueError, ("norm", f"one of {NORMS}", "'batch'")),
    (
        FusedConvNeXtBlock,
        {"dim": 8, "activation": "GELU"},
        ValueError,
        ("activation", f"one of {ACTIVATIONS}", "'GELU'"),
    ),
    (FusedConvNeXtBlock, {"dim": 8, "activation": None}, TypeError, ("activation", "a string", "None")),
    (FusedConvNeXtBlock, {"dim": 8, "drop_path": 1}, ValueError, ("drop_path", PROBABILITY, "1")),
    (FusedConvNeXtBlock, {"dim": 8, "drop_path": None}, TypeError, ("drop_path", "a number", "None")),
    *(
        (
            FusedConvNeXtBlock,
            {"dim": 8, "layer_scale_init_value": value},
            error,
            ("layer_scale_init_value", wanted, said),
        )
        for value, error, wanted, said in (
            (math.nan, ValueError, "a finite number", "nan"),
            (None, TypeError, "a number", "None"),
        )
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


def test_unknown_backend_of_a_model():
    with pytest.raises(ValueError, match=r"^backend: unknown backend 'fpga'"):
        create_model("convnextv2_atto", backend="fpga")
