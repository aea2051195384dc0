"""torchvision's ConvNeXt."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.ops import StochasticDepth

import convnext_kernels as ck
from tests.interop.helpers import assert_close, fused_calls, gradients
from tests.tolerance import randomize_


def block(drop=0.0, **options):
    return randomize_(CNBlock(8, 1.0, drop, **options)).double()


def reason(module):
    (row,) = [r for r in ck.acceleration_report(module).rows if r.kind == "block"]
    return row.reason


def set_layer(index, layer):
    return lambda m: m.block.__setitem__(index, layer)


CHANGES = {
    "ELU": (set_layer(4, nn.ELU()), "the activation is ELU(alpha=1.0)"),
    "another order": (set_layer(1, nn.Identity()), "expected a permutation to [0, 2, 3, 1], got Identity"),
    "strided": (lambda m: setattr(m.block[0], "stride", (2, 2)), "the depthwise convolution has stride (2, 2)"),
    "reflection": (lambda m: setattr(m.block[0], "padding_mode", "reflect"), "'reflect' does not keep the size"),
    "huge kernel": (set_layer(0, nn.Conv2d(8, 8, 53, padding=26, groups=8)), "at most 51"),
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


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.4, 1.0])
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


def test_downsampling_that_is_left():
    pair = nn.Sequential(torchvision.models.convnext.LayerNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1))
    ck.accelerate(pair)
    assert type(pair) is nn.Sequential
    rows = {r.name: r for r in ck.acceleration_report(pair).rows}
    assert rows[""].reason == "the convolution has kernel size (3, 3) and stride (2, 2)"
    assert rows["0"].replaced, "its norm can still be served"
