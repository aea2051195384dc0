"""timm's ConvNeXt V1 and V2."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import nn

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, fused_calls, gradients, images
from tests.tolerance import randomize_


def block(**options):
    return randomize_(ConvNeXtBlock(8, **{"ls_init_value": 1.0, **options})).double()


SERVED = {
    "dilated": {"kernel_size": 3, "dilation": 2},
    "no layer scale": {"ls_init_value": None},
    "no convolution bias": {"conv_bias": False},
    "GRN and layer scale, 1x1 convolutions": {"use_grn": True, "conv_mlp": True},
    "norm with another eps": {"conv_mlp": True, "norm_layer": partial(LayerNorm2d, eps=0.1)},
    "PyTorch's norm": {"norm_layer": nn.LayerNorm},
    "ReLU": {"act_layer": "relu"},
    "Mish": {"act_layer": "mish"},
    "quick GELU": {"act_layer": "quick_gelu"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "PyTorch's tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "RMSNorm": {"norm_layer": RmsNorm},
    "RMSNorm of NCHW in V2": {"norm_layer": RmsNorm2d, "conv_mlp": True, "use_grn": True},
    "SimpleNorm of NCHW": {"norm_layer": partial(SimpleNorm2d, eps=0.1), "conv_mlp": True},
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_served(options):
    original = block(**options)
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 8, 9, 7).double()
    assert fused_calls(lambda: accelerated(x)) == {"block": 1}
    assert_close(accelerated(x), original(x), torch.float64)
    expected, actual = gradients(original, x), gradients(accelerated, x)
    for name in expected:
        assert_close(actual[name], expected[name], torch.float64, name)


CHANGED = {
    "strided": ({"stride": 2}, ["dwconv", "mlp"]),
    "strided, V2, 1x1 convolutions": ({"stride": 2, "use_grn": True, "conv_mlp": True}, ["dwconv", "mlp"]),
    "strided, RMSNorm and drop path": ({"stride": 2, "norm_layer": RmsNorm, "drop_path": 0.5}, ["dwconv", "mlp"]),
    "wider": ({"out_chs": 16}, ["mlp"]),
    "strided and wider": ({"stride": 2, "out_chs": 16, "ls_init_value": None}, ["mlp"]),
    "two dilations": ({"dilation": (1, 2)}, ["dwconv", "mlp"]),
}


@pytest.mark.parametrize(("options", "ops"), CHANGED.values(), ids=CHANGED)
def test_blocks_that_change_the_shape(options, ops):
    """The convolution, if it is depthwise, and the bottleneck are ops; the shortcut is timm's."""
    original = block(**options)
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(4, 8, 9, 8).double()
    results = []
    for module in (original, accelerated):
        torch.manual_seed(1)
        results.append(gradients(module, x))
    torch.manual_seed(1)
    assert fused_calls(lambda: accelerated(x)) == dict.fromkeys(ops, 1)
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, torch.float64, name)
    (row,) = ck.acceleration_report(accelerated).rows
    assert row.replaced
    assert type(ck.restore(accelerated)) is ConvNeXtBlock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strided_block_under_autocast_and_compiled(dtype):
    """The original's dtype, and one graph."""
    original = block(stride=2, out_chs=8).float()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 8, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = accelerated(x), original(x)
        compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == compiled.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)
    assert torch.equal(compiled, y)


LEFT = {
    "ELU": ({"act_layer": "elu"}, "the activation is ELU(alpha=1.0)"),
    "RMSNorm of the wrong layout": ({"norm_layer": RmsNorm2d}, "the norm is a RmsNorm2d"),
    "norm without parameters": (
        {"norm_layer": partial(LayerNorm2d, affine=False), "conv_mlp": True},
        "the norm has no weight or no bias",
    ),
    "even kernel": ({"kernel_size": 4}, "the kernel size (4, 4) is not odd and at most 51"),
}


@pytest.mark.parametrize(("options", "expected"), LEFT.values(), ids=LEFT)
def test_left_and_why(options, expected, caplog):
    m = block(**options)
    ck.accelerate(m)
    assert type(m) is ConvNeXtBlock
    rows = [r for r in ck.acceleration_report(m).rows if r.kind == "block"]
    assert [(r.replaced, r.type) for r in rows] == [(False, "ConvNeXtBlock")]
    assert expected in rows[0].reason
    assert f"{rows[0].name or '(the model)'}" in str(ck.acceleration_report(m))
    others = [r for r in ck.acceleration_report(m).rows if r.replaced]  # its norm, its depthwise convolution
    assert caplog.records or others, "nothing was replaced, and nobody was told"


def test_dropout_in_the_mlp():
    """Nothing to fuse while it drops, and nothing in the way in eval mode."""
    original = block()
    original.mlp.drop1.p = 0.5
    accelerated = ck.accelerate(copy.deepcopy(original).eval()).train()
    x = torch.randn(4, 8, 5, 5).double()
    outputs = []
    for m in (original, accelerated):
        torch.manual_seed(1)
        outputs.append(m(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not fused_calls(lambda: accelerated(x))
    (row,) = ck.acceleration_report(accelerated).rows
    assert "runs the original forward for now: the MLP has Dropout(p=0.5, inplace=False) in training" in row.reason
    assert fused_calls(lambda: accelerated.eval()(x)) == {"block": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: setattr(m.mlp, "norm", nn.LayerNorm(32)), "the MLP has a LayerNorm"),
        (lambda m: setattr(m, "use_conv_mlp", True), "the norm is a LayerNorm"),
        (lambda m: setattr(m.mlp, "fc1", nn.Conv2d(8, 32, 1)), "the MLP has Conv2d layers, but use_conv_mlp=False"),
    ],
)
def test_changed_inner_modules_are_seen(change, expected):
    m = ck.accelerate(block())
    change(m)
    (row,) = ck.acceleration_report(m).rows
    assert f"runs the original forward for now: {expected}" in row.reason


@pytest.mark.parametrize("name", ["convnext_zepto_rms_ols"])
def test_models_with_other_norms_and_activations(name):
    """timm's own entry points: every block, norm and downsampling layer, logits and gradients."""
    original = randomize_(timm.create_model(name, num_classes=7)).double().eval()
    accelerated = ck.accelerate(copy.deepcopy(original))
    assert all(r.replaced for r in ck.acceleration_report(accelerated).rows)
    x = images(2, 32)
    assert_close(accelerated(x), original(x), torch.float64)
    expected, actual = gradients(original, x), gradients(accelerated, x)
    for key in expected:
        assert_close(actual[key], expected[key], torch.float64, key)
    with torch.no_grad():  # stages in one call where the backend has one
        assert_close(accelerated.float()(x.float()), original(x).float(), torch.float32)
    assert ck.restore(accelerated).state_dict().keys() == original.state_dict().keys()


def test_checkpointing_and_intermediates():
    original = MODELS["timm-v2"].make()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images()
    expected, actual = gradients(original, x), gradients(accelerated, x)
    accelerated.set_grad_checkpointing()
    checkpointed = gradients(accelerated.train(), x)
    for name in expected:
        assert_close(actual[name], expected[name], torch.float64, name)
        assert_close(checkpointed[name], expected[name], torch.float64, name)
    accelerated.eval()
    for a, e in zip(accelerated.forward_intermediates(x)[1], original.forward_intermediates(x)[1], strict=True):
        assert_close(a, e, torch.float64)
