"""Depthwise convolutions of volumes in other models: MedNeXt's blocks."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.interop.adapter import Adapter
from tests.interop.helpers import fused_calls
from tests.interop.official import MedNeXtBlock
from tests.tolerance import randomize_


def network():
    """A stem, a stage, a block that halves the volume, a stage with GRN, a block that doubles it, and a head."""
    return nn.Sequential(
        nn.Conv3d(1, 6, 1),
        MedNeXtBlock(6, 6),
        MedNeXtBlock(6, 12, kernel=5, stride=2),
        MedNeXtBlock(12, 12, kernel=7, grn=True),
        MedNeXtBlock(12, 6, conv=nn.ConvTranspose3d, stride=2),
        nn.Conv3d(6, 3, 1),
    )


def step(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_a_network(memory_format):
    """Logits and all gradients, then the original again."""
    model = randomize_(network()).to(memory_format=memory_format)
    accelerated = ck.accelerate(copy.deepcopy(model))
    x = torch.randn(2, 1, 6, 7, 8).to(memory_format=memory_format)
    y, gradients = step(model, x)
    found, found_gradients = step(accelerated, x)
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-3, atol=1e-4)
    rows = {row.name: row for row in ck.acceleration_report(accelerated).rows}
    assert {name: (row.kind, row.replaced) for name, row in rows.items()} == {
        **{name: ("block", name in "13") for name in "1234"},
        **{f"{name}.conv1": ("depthwise convolution", True) for name in "24"},
        **{f"{name}.norm": ("group norm", True) for name in "24"},
    }
    assert "its convolution is a ConvTranspose3d, so the block changes the size" in rows["4"].reason
    assert "the depthwise convolution has stride (2, 2, 2)" in rows["2"].reason
    assert [*accelerated.state_dict()] == [*model.state_dict()]
    ck.restore(accelerated)
    assert not any(isinstance(module, Adapter) for module in accelerated.modules())
    torch.testing.assert_close(accelerated(x), model(x), rtol=0, atol=0)


def test_the_op_is_called():
    """Once for each replaced layer, and its result is channels_last_3d, so that the layers after it are fast."""
    model = ck.accelerate(network())
    called = []
    for module in model.modules():
        if isinstance(module, Adapter):
            module.register_forward_hook(lambda _m, _x, y: called.append(y))
    calls = fused_calls(lambda: model(torch.randn(1, 1, 6, 7, 8)))
    assert len(called) == 6
    assert all(y.is_contiguous(memory_format=torch.channels_last_3d) for y in called)
    assert (calls["dwconv3d"], calls["dwconv3d_transposed"]) == (3, 1)


def test_other_input_runs_the_original():
    """Without a batch, empty, of another dtype under autocast: what PyTorch gives."""
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    model = ck.accelerate(copy.deepcopy(conv))
    for shape in ((4, 5, 6, 7), (0, 4, 5, 6, 7)):
        x = torch.randn(shape)
        assert torch.equal(model(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 4, 5, 6, 7)).dtype == torch.bfloat16
