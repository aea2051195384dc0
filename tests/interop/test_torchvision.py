"""torchvision's ConvNeXt."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import StochasticDepth

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, fused_calls, gradients, images
from tests.tolerance import randomize_


def block(drop=0.0, **options):
    return randomize_(CNBlock(8, 1.0, drop, **options)).double()


def reason(module):
    (row,) = [r for r in ck.acceleration_report(module).rows if r.kind == "block"]
    return row.reason


def test_tiny_is_replaced_as_a_whole():
    model = torchvision.models.convnext_tiny()
    rows = ck.acceleration_report(ck.accelerate(model)).rows
    assert all(r.replaced for r in rows)
    kinds = [r.kind for r in rows]
    assert [kinds.count(k) for k in ("block", "downsampling", "layer norm")] == [18, 3, 2]
    assert {r.type for r in rows} == {"CNBlock", "Sequential", "LayerNorm2d"}


def test_feature_extractor():
    m = MODELS["torchvision"].make()
    x = images()
    expected = create_feature_extractor(m, ["features.1", "features.2"])(x)
    actual = create_feature_extractor(ck.accelerate(m), ["features.1", "features.2"])(x)
    for name in expected:
        assert_close(actual[name], expected[name], torch.float64, name)


def without_bias(channels):
    return nn.LayerNorm(channels, bias=False)


def without_affine(channels):
    return nn.LayerNorm(channels, elementwise_affine=False)


@pytest.mark.parametrize(
    ("norm_layer", "expected"),
    [
        (nn.RMSNorm, "the norm is a RMSNorm"),
        (without_bias, "the norm has no weight or no bias"),
        (without_affine, "the norm has no weight or no bias"),
        (nn.Identity, "the norm is a Identity"),
    ],
)
def test_other_norms_are_left(norm_layer, expected):
    m = block(norm_layer=norm_layer)
    ck.accelerate(m)
    assert type(m) is CNBlock
    assert reason(m) == expected


def set_layer(index, layer):
    return lambda m: m.block.__setitem__(index, layer)


CHANGES = {
    "ELU": (set_layer(4, nn.ELU()), "the activation is ELU(alpha=1.0)"),
    "one more layer": (lambda m: m.block.append(nn.Dropout(0.1)), "it has 8 layers, expected 7"),
    "another order": (set_layer(1, nn.Identity()), "expected a permutation to [0, 2, 3, 1], got Identity"),
    "strided": (lambda m: setattr(m.block[0], "stride", (2, 2)), "the depthwise convolution has stride (2, 2)"),
    "no padding": (lambda m: setattr(m.block[0], "padding", (0, 0)), "the padding (0, 0), 'zeros' does not keep"),
    "reflection": (lambda m: setattr(m.block[0], "padding_mode", "reflect"), "'reflect' does not keep the size"),
    "even kernel": (set_layer(0, nn.Conv2d(8, 8, 4, padding="same", groups=8)), "the kernel size (4, 4) is not odd"),
    "huge kernel": (set_layer(0, nn.Conv2d(8, 8, 53, padding=26, groups=8)), "at most 51"),
    "dense": (set_layer(0, nn.Conv2d(8, 8, 7, padding=3)), "the convolution is not depthwise: 8 -> 8, 1 groups"),
    "norm over more": (set_layer(2, nn.LayerNorm((6, 8))), "the norm is over (6, 8), not over the 8 channels"),
    "strided pointwise": (set_layer(3, nn.Conv2d(8, 32, 1, stride=2)), "a pointwise layer is a convolution (8, 32"),
    "padded pointwise": (set_layer(3, nn.Conv2d(8, 32, 1, padding=1)), "a pointwise layer has padding (1, 1)"),
    "other drop path": (
        lambda m: setattr(m, "stochastic_depth", nn.Dropout(0.1)),
        "the drop path is a Dropout",
    ),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_is_left_and_why(change, expected):
    """Before accelerate such a block is left; after it, it runs its own forward."""
    m = block()
    change(m)
    ck.accelerate(m)
    assert type(m) is CNBlock
    assert expected in reason(m)
    m = ck.accelerate(block())
    change(m)
    assert expected in reason(m)
    assert reason(m).startswith("fused block, backend auto; runs the original forward for now: ")


def test_changed_attributes_are_read_at_every_call():
    m = ck.accelerate(block())
    x = torch.randn(2, 8, 9, 9).double()
    m.block[0].dilation, m.block[0].padding = (2, 2), (6, 6)
    m.block[2].eps = 0.1
    assert fused_calls(lambda: m(x)) == {"block": 1}
    assert_close(m(x), ck.restore(copy.deepcopy(m))(x), torch.float64)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_stochastic_depth(mode, p):
    original = block()
    original.stochastic_depth = StochasticDepth(p, mode)
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(16, 8, 5, 5).double()
    for seed in range(3):
        outputs = []
        for m in (original, accelerated):
            torch.manual_seed(seed)
            outputs.append((m(x), gradients(m, x)["input"]))
        for actual, expected in zip(outputs[1], outputs[0], strict=True):
            assert_close(actual, expected, torch.float64)
    assert fused_calls(lambda: accelerated(x)) == {"block": 1}
    if p == 1.0:
        assert torch.equal(accelerated(x), x)


def test_stochastic_depth_alone_in_training():
    """Monte Carlo inference: the model is in eval mode, its stochastic depth is not."""
    original = block(drop=0.5).eval()
    original.stochastic_depth.train()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(16, 8, 5, 5).double()
    outputs = []
    for m in (original, accelerated):
        torch.manual_seed(1)
        outputs.append(m(x))
    assert_close(outputs[1], outputs[0], torch.float64)
    assert (outputs[1] == x).flatten(1).all(1).any()


def test_downsampling_that_is_left():
    pair = nn.Sequential(torchvision.models.convnext.LayerNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1))
    ck.accelerate(pair)
    assert type(pair) is nn.Sequential
    rows = {r.name: r for r in ck.acceleration_report(pair).rows}
    assert rows[""].reason == "the convolution has kernel size (3, 3) and stride (2, 2)"
    assert rows["0"].replaced, "its norm can still be served"


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 2), (3, 2)])
def test_downsampling_of_odd_sizes(size):
    pair = randomize_(nn.Sequential(torchvision.models.convnext.LayerNorm2d(8), nn.Conv2d(8, 16, 2, stride=2))).double()
    x = torch.randn(2, 8, *size).double()
    expected = pair(x)
    ck.accelerate(pair)
    assert fused_calls(lambda: pair(x)) == {"downsample": 1}
    assert_close(pair(x), expected, torch.float64)


def test_hook_on_a_layer_of_the_downsampling():
    m = ck.accelerate(MODELS["torchvision"].make())
    fired = []
    handle = m.features[2][0].register_forward_hook(lambda *_: fired.append(1))
    assert fused_calls(lambda: m(images())) == {"block": 4, "layernorm": 2}
    assert fired
    handle.remove()
    assert fused_calls(lambda: m(images()))["downsample"] == 1
