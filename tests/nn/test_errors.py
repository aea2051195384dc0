"""Bad arguments of the modules: the exception's type, and that the message names argument, value and expectation."""

import math

import pytest

from convnext_kernels import BackendError, DepthwiseConv2d, FusedConvNeXtBlock, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.models import create_model
from convnext_kernels.nn import PatchDownsample2d


def downsample(channels, out_channels=12, **options):
    return PatchDownsample2d(channels, out_channels, **options)


BLOCK, DWCONV, NORM, GRN = FusedConvNeXtBlock, DepthwiseConv2d, LayerNorm2d, GlobalResponseNorm
INTEGER = "an integer of at least 1"
KERNEL = "odd kernel sizes from 1 to 51"
EPS = "a finite number of at least 0"
PROBABILITY = "a probability from 0 up to but not including 1"

# module, its first argument, another, exception, what was expected and what came
TABLE = [
    *((module, 0, {}, ValueError, INTEGER, "0") for module in (BLOCK, DWCONV, NORM, GRN, downsample)),
    (NORM, 8.0, {}, TypeError, INTEGER, "8.0"),
    (downsample, 8, {"kernel_size": 0}, ValueError, INTEGER, "0"),
    (BLOCK, 8, {"mlp_ratio": 2.5}, TypeError, INTEGER, "2.5"),
    (BLOCK, 8, {"dilation": -1}, ValueError, INTEGER, "-1"),
    (BLOCK, 8, {"kernel_size": (3, 4)}, ValueError, KERNEL, "3x4"),
    (DWCONV, 8, {"kernel_size": 53}, ValueError, KERNEL, "53"),
    (DWCONV, 8, {"kernel_size": (3, 5, 7)}, ValueError, "one integer or two, for height and width", "(3, 5, 7)"),
    (DWCONV, 8, {"stride": 3}, ValueError, "1 or 2", "3"),
    (BLOCK, 8, {"eps": "1e-6"}, TypeError, "a number", "'1e-6'"),
    (GRN, 8, {"eps": math.nan}, ValueError, EPS, "nan"),
    (BLOCK, 8, {"norm": "batch"}, ValueError, "one of 'layer', 'rms', 'simple'", "'batch'"),
    (BLOCK, 8, {"activation": None}, TypeError, "a string", "None"),
    (BLOCK, 8, {"drop_path": 1}, ValueError, PROBABILITY, "1"),
    (BLOCK, 8, {"layer_scale_init_value": math.nan}, ValueError, "a finite number", "nan"),
]


@pytest.mark.parametrize(("module", "first", "options", "error", "expected", "got"), TABLE)
def test_constructor(module, first, options, error, expected, got):
    with pytest.raises(error) as caught:
        module(first, **options)
    name = next(iter(options), "dim" if module is BLOCK else "channels")
    assert str(caught.value) == f"{name}: expected {expected}, got {got}"


def test_input_that_is_no_tensor_with_drop_path():
    """Drop path looks at x before the op does."""
    with pytest.raises(TypeError, match=r"x: expected a tensor, got list"):
        FusedConvNeXtBlock(8, drop_path=0.5)([1.0])


@pytest.mark.parametrize(
    "module", [BLOCK, DWCONV, NORM, GRN, downsample, lambda _, **k: create_model("convnextv2_atto", **k)]
)
def test_unknown_backend(module):
    with pytest.raises(ValueError, match=r"^backend: unknown backend 'fpga', expected one of auto, .*eager$") as caught:
        module(8, backend="fpga")
    assert isinstance(caught.value, BackendError), "what a call raises for it"
    with pytest.raises(TypeError, match=r"^backend: expected the name of a backend \(str\), got NoneType$"):
        module(8, backend=None)
