"""Bad input: the exception's type, and that its message names the argument, what came and what was expected.

Every row for a function starts from valid arguments, changes one, and lists what the message must say.
"""

import math

import pytest
import torch
from torch import nn

from convnext_kernels import (
    BackendError,
    DepthwiseConv2d,
    FusedConvNeXtBlock,
    FusedConvNeXtBlock1d,
    GlobalResponseNorm,
    LayerNorm2d,
    compat,
    functional,
)
from convnext_kernels.models import ConvNeXt, create_model, export_weights, load_weights
from convnext_kernels.nn import DepthwiseConv1d, PatchDownsample2d
from tests.operators import OPERATORS
from tests.shapes import BOTTLENECK, Case

CASES = {
    "v1": Case("V1", n=2, c=6, h=6, w=4, k=3, ratio=2),
    "v2": Case("V2", n=2, c=6, h=6, w=4, k=3, ratio=2, variant="v2"),
}


def arguments(op: str) -> dict:
    variant = "v2" if op in ("mlp v2", "block v2") else "v1"
    return OPERATORS[op.split()[0]].arguments(CASES[variant], torch.float32)


def call(op: str, changed: dict):
    return OPERATORS[op.split()[0]].call(**{**arguments(op), **changed})


# What must be in the message, for an argument that depends on nothing else.
IMAGES = {
    "3 dimensions": (torch.zeros(6, 6, 4), ValueError, "4 dimensions (N, C, H, W)", "3 with shape (6, 6, 4)"),
    "int64": (torch.zeros(2, 6, 6, 4, dtype=torch.int64), TypeError, "expected float32, bfloat16", "torch.int64"),
    "no width": (torch.zeros(2, 6, 6, 0), ValueError, "at least 1", "(2, 6, 6, 0)"),
    "list": ([1.0], RuntimeError, "type 'Tensor'", "'list'"),
    "None": (None, TypeError, "expected a tensor", "NoneType"),
}


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("what", IMAGES)
def test_x(op, what):
    x, error, *fragments = IMAGES[what]
    if op == "dwconv3d" and isinstance(x, torch.Tensor):
        x, fragments = x.unsqueeze(2), [f.replace("4 d", "5 d").replace("(N, C,", "(N, C, D,") for f in fragments[:1]]
    with pytest.raises(error) as caught:
        call(op, {"x": x})
    for fragment in ("x", *fragments):
        assert fragment in str(caught.value)


def parameters(op: str) -> list[str]:
    """Names of the tensors that must match x in dtype and device, and have a number of elements or a shape."""
    return [name for name, value in arguments(op).items() if isinstance(value, torch.Tensor) and name != "x"]


ROWS = [(op, name) for op in OPERATORS for name in parameters(op)]
ROWS += [(f"{op} v2", name) for op in BOTTLENECK for name in ("grn_weight", "grn_bias")]


@pytest.mark.parametrize(("op", "name"), ROWS)
def test_mixed_dtypes_and_devices(op, name):
    with pytest.raises(TypeError, match=rf"^{name}: expected x's dtype torch.float32, got torch.float64$"):
        call(op, {name: arguments(op)[name].double()})
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on x's device cpu, got one on meta"):
        call(op, {name: arguments(op)[name].to("meta")})


# The rows of these matrices define a size, so that the next argument is the one that disagrees.
DEFINE_A_SIZE = {
    ("mlp", "pwconv1_weight"): "pwconv1_bias",
    ("block", "pwconv1_weight"): "pwconv1_bias",
    ("downsample", "weight"): "bias",
}


@pytest.mark.parametrize(("op", "name"), ROWS)
def test_channel_mismatch(op, name):
    """One element (or one row, or one sample) too many."""
    shape = arguments(op)[name].shape
    blamed = DEFINE_A_SIZE.get((op, name), name)
    with pytest.raises(ValueError, match=rf"^{blamed}: expected .*, got ") as caught:
        call(op, {name: torch.zeros(shape[0] + 1, *shape[1:])})
    for number in (shape[0], shape[0] + 1):  # what was expected and what came
        assert str(number) in str(caught.value)


@pytest.mark.parametrize("op", OPERATORS)
def test_x_has_other_channels_than_all_parameters(op):
    x = arguments(op)["x"][:, :5]
    with pytest.raises(ValueError, match=r"^x: expected 6 channels, as .* and \w+ have, got \(2, 5, "):
        call(op, {"x": x, **({"residual": x} if op == "mlp" else {})})


# op, changed arguments, exception, fragments of the message
TABLE = [
    # depthwise kernels
    *(
        row
        for op, name in (("dwconv", "weight"), ("block", "dwconv_weight"))
        for row in (
            (op, {name: torch.zeros(6, 1, 4, 4)}, ValueError, (name, "odd kernel sizes from 1 to 51", "got 4")),
            (op, {name: torch.zeros(6, 1, 5, 53)}, ValueError, (name, "odd kernel sizes from 1 to 51", "got 5x53")),
            (op, {name: torch.zeros(6, 6, 3, 3)}, ValueError, (name, "(6, 1, KH, KW)", "got (6, 6, 3, 3)")),
            (op, {"dilation": 0}, ValueError, ("dilation", "at least 1", "got 0")),
        )
    ),
    ("block", {"dilation": (1, 0)}, ValueError, ("dilation", "at least 1", "got 0")),
    ("dwconv", {"dilation": (1, 2, 1)}, ValueError, ("dilation", "one integer or two", "got (1, 2, 1)")),
    ("dwconv", {"dilation": (1, "2")}, RuntimeError, ("dilation_w", "'int'", "'str'")),
    ("layernorm", {"eps": "small"}, RuntimeError, ("eps", "'float'", "'str'")),
    ("dwconv", {"stride": 3}, ValueError, ("stride", "1 or 2", "got 3")),
    ("dwconv", {"stride": (2, 2)}, TypeError, ("stride", "one integer", "got (2, 2)")),
    ("dwconv3d", {"weight": torch.zeros(6, 3, 3, 3)}, ValueError, ("weight", "(6, 1, KD, KH, KW)", "got (6, 3, 3, 3)")),
    ("dwconv3d", {"weight": torch.zeros(6, 1, 3, 9, 3)}, ValueError, ("weight", "sizes from 1 to 7", "got 3x9x3")),
    ("dwconv3d", {"stride": 3}, ValueError, ("stride", "1 or 2", "got 3")),
    # eps
    *(
        (op, {name: value}, ValueError, (f"{name}: ", "a finite number of at least 0", f"got {value}"))
        for op, name in (
            *((op, "eps") for op in ("layernorm", "grn", "mlp", "block", "downsample")),
            *((op, "grn_eps") for op in ("mlp v2", "block v2")),
        )
        for value in (-1e-6, float("nan"))
    ),
    # the bottleneck
    *(
        row
        for op in ("mlp", "block")
        for row in (
            (op, {"norm": "batch"}, ValueError, ("norm", "one of 'layer', 'rms', 'simple'", "got 'batch'")),
            (op, {"activation": "elu"}, ValueError, ("activation", "one of 'gelu', 'gelu_tanh'", "got 'elu'")),
            (op, {"norm_bias": None}, ValueError, ("norm_bias", "a tensor with norm='layer'", "got None")),
            (op, {"norm": "rms"}, ValueError, ("norm_bias", "None with norm='rms'", "got shape (6)")),
            (op, {"pwconv1_weight": torch.zeros(12, 7)}, ValueError, ("pwconv1_weight", "(hidden, 6)", "got (12, 7)")),
            (op, {"pwconv1_weight": torch.zeros(12, 6, 3, 3)}, ValueError, ("(out, in, 1, 1)", "got (12, 6, 3, 3)")),
            (op, {"pwconv2_weight": torch.zeros(6, 11)}, ValueError, ("pwconv2_weight", "(6, 12)", "got (6, 11)")),
            (op, {"grn_weight": torch.zeros(12)}, ValueError, ("grn_weight, grn_bias", "both or neither", "got one")),
            (op, {"norm_weight": torch.ones(2, 6)}, ValueError, ("norm_bias", "shape (2, 6)", "got (6)")),
            (op, {"norm_weight": torch.ones(3, 6)}, ValueError, ("norm_weight", "6 elements", "got 18")),
            (op, {"drop_scale": torch.ones(3)}, ValueError, ("drop_scale", "2 elements", "got 3")),
            (op, {"drop_scale": torch.ones(2).double()}, TypeError, ("drop_scale", "x's dtype", "torch.float64")),
        )
    ),
    ("block", {"memory": "low"}, ValueError, ("memory", "'min'", "got 'low'")),
    ("mlp", {"residual": torch.zeros(2, 6, 4, 6)}, ValueError, ("residual", "(2, 6, 6, 4)", "got (2, 6, 4, 6)")),
    # downsampling
    ("downsample", {"weight": torch.zeros(9, 5, 2, 2)}, ValueError, ("weight", "(D, 6, K, K)", "got (9, 5, 2, 2)")),
    ("downsample", {"weight": torch.zeros(9, 6, 2, 3)}, ValueError, ("weight", "square", "got 2x3")),
    ("downsample", {"weight": torch.zeros(9, 6, 5, 5)}, ValueError, ("weight", "5x5 patch", "(2, 6, 6, 4)")),
    ("downsample", {"weight": torch.zeros(9, 6, 0, 0)}, ValueError, ("weight", "at least 1", "got")),
    ("downsample", {"weight": torch.zeros(9, 6)}, ValueError, ("weight", "(D, 6, K, K)", "got (9, 6)")),
]


@pytest.mark.parametrize(("op", "changed", "error", "fragments"), TABLE)
def test_table(op, changed, error, fragments):
    with pytest.raises(error) as caught:
        call(op, changed)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


@pytest.mark.parametrize("op", OPERATORS)
def test_the_same_checks_on_meta_tensors(op):
    """The fake kernels ask the same questions, so that tracing fails with the same words."""
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments(op).items()}
    with pytest.raises(ValueError, match=r"^x: expected [45] dimensions"):
        OPERATORS[op].call(**{**meta, "x": torch.zeros(3, device="meta")})


@pytest.mark.parametrize("op", BOTTLENECK)
def test_a_norm_for_each_sample_has_no_gradient(op):
    changed = {name: torch.ones(2, 6, requires_grad=True) for name in ("norm_weight", "norm_bias")}
    with pytest.raises(ValueError, match=r"norm_weight: expected 6 elements where a gradient is computed, got .*2, 6"):
        call(op, changed)


def downsample(channels, out_channels=12, **options):
    return PatchDownsample2d(channels, out_channels, **options)


BLOCK, DWCONV, NORM, GRN = FusedConvNeXtBlock, DepthwiseConv2d, LayerNorm2d, GlobalResponseNorm
INTEGER = "an integer of at least 1"
KERNEL = "odd kernel sizes from 1 to 51"

# module, its first argument, another, exception, what was expected and what came
MODULES = [
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
    (GRN, 8, {"eps": math.nan}, ValueError, "a finite number of at least 0", "nan"),
    (BLOCK, 8, {"norm": "batch"}, ValueError, "one of 'layer', 'rms', 'simple'", "'batch'"),
    (BLOCK, 8, {"activation": None}, TypeError, "a string", "None"),
    (BLOCK, 8, {"memory": "low"}, ValueError, "one of 'auto', 'min', 'balanced'", "'low'"),
    (BLOCK, 8, {"drop_path": 1}, ValueError, "a probability from 0 up to but not including 1", "1"),
    (BLOCK, 8, {"layer_scale_init_value": math.nan}, ValueError, "a finite number", "nan"),
]


@pytest.mark.parametrize(("module", "first", "options", "error", "expected", "got"), MODULES)
def test_constructor(module, first, options, error, expected, got):
    with pytest.raises(error) as caught:
        module(first, **options)
    name = next(iter(options), "dim" if module is BLOCK else "channels")
    assert str(caught.value) == f"{name}: expected {expected}, got {got}"


@pytest.mark.parametrize(
    "module", [BLOCK, DWCONV, NORM, GRN, downsample, lambda _, **k: create_model("convnextv2_atto", **k)]
)
def test_unknown_backend(module):
    with pytest.raises(ValueError, match=r"^backend: unknown backend 'fpga', expected one of auto, .*eager$") as caught:
        module(8, backend="fpga")
    assert isinstance(caught.value, BackendError), "what a call raises for it"
    with pytest.raises(TypeError, match=r"^backend: expected the name of a backend \(str\), got NoneType$"):
        module(8, backend=None)


BLOCK1D, SEQUENCE = FusedConvNeXtBlock1d, torch.zeros(2, 8, 5)
ADAPTIVE = BLOCK1D(8, adanorm_num_embeddings=4)
CONV, NARROW = (nn.Conv2d(c, c, 5, padding=2, groups=c) for c in (6, 4))


def network(**options):
    return ConvNeXt(**{"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), **options})


# a call, exception, words of its message
CALLS = [
    # Drop path looks at x before the op does.
    (lambda: BLOCK(8, drop_path=0.5)([1.0]), TypeError, r"x: expected a tensor, got list"),
    # over time
    (lambda: BLOCK1D(8, kernel_size=(1, 7)), TypeError, "kernel_size: expected an integer"),
    (lambda: BLOCK1D(8, adanorm_num_embeddings=2, norm="rms"), ValueError, "norm: expected 'layer'"),
    (lambda: BLOCK1D(8)(SEQUENCE[:, :, None]), ValueError, r"3 dimensions \(N, C, L\), got 4"),
    (lambda: BLOCK1D(8)(SEQUENCE.mT), ValueError, r"x: expected 8 channels, as dwconv_weight .* have, got \(2, 5, 8\)"),
    (lambda: BLOCK1D(8, channels_last=True)(torch.zeros(5)), ValueError, r"\(N, L, C\), got 1"),
    (lambda: BLOCK1D(8)(SEQUENCE, torch.tensor(0)), TypeError, "cond_embedding_id: expec"),
    (lambda: ADAPTIVE(SEQUENCE, torch.tensor([0, 1])), ValueError, "one integer or shape"),
    (lambda: ADAPTIVE(SEQUENCE, torch.tensor([[0], [4]])), IndexError, "expected 0 to 3, got 4"),
    (lambda: functional.depthwise_conv1d(SEQUENCE, torch.zeros(8, 1, 1, 3)), ValueError, r"expected shape \(8, 1, K\)"),
    (lambda: DepthwiseConv1d(8, 3, stride=3), ValueError, "stride: expected 1 or 2, got 3"),
    # the class of RepLKNet, and merging
    (lambda: compat.DepthWiseConv2dImplicitGEMM(6, 4), ValueError, "kernel_size: expected"),
    (lambda: compat.fold_batch_norm(CONV, CONV), TypeError, "norm: expected a BatchNorm, got Conv2d"),
    (lambda: compat.fold_batch_norm(CONV, nn.BatchNorm2d(4)), ValueError, "norm: expected 6 channels, got 4"),
    (
        lambda: compat.fold_batch_norm(CONV, nn.BatchNorm2d(6, track_running_stats=False)),
        ValueError,
        "norm: has no running statistics",
    ),
    (lambda: compat.merge_parallel(CONV, NARROW), ValueError, r"convs\[1\]: expected 6 channels, got 4"),
    (lambda: compat.merge(nn.Sequential(nn.BatchNorm2d(6))), ValueError, "model: is in training"),
    # weights of other libraries
    (lambda: load_weights(network(), {}, format="tim"), ValueError, "format: unknown format 'tim'; close: timm"),
    (lambda: load_weights(network(), {"a.b": torch.zeros(1)}), ValueError, "no ConvNeXt weights of a known format"),
    (lambda: export_weights(network(use_grn=True), "torchvision"), ValueError, "torchvision has no V2 networks"),
    # networks
    (lambda: network(depths=(1, 2)), ValueError, "dims: expected one for each of the 2 stages, got 4"),
    (lambda: network(dims=(8, 0, 8, 8)), ValueError, r"dims\[1\]: expected an integer of at least 1, got 0"),
    (
        lambda: network(features_only=True, out_indices=(0, 4)),
        ValueError,
        "out_indices: expected different integers",
    ),
    (lambda: network(out_indices=(1,)), ValueError, "out_indices: needs features_only=True"),
    (
        lambda: create_model("convnext_tinny"),
        ValueError,
        "name: unknown model 'convnext_tinny'; close: .*_tiny",
    ),
    *(
        (
            lambda shape=shape: network()(torch.randn(shape)),
            ValueError,
            r"x: expected images \(N, 3, H, W\) of at least 32",
        )
        for shape in ((1, 3, 31, 64), (1, 4, 32, 32), (3, 32, 32))
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=range(len(CALLS)))
def test_calls(call, error, words):
    with pytest.raises(error, match=words):
        call()
