"""Convolutions that are no part of a ConvNeXt's blocks: those of volumes in MedNeXt's; the stem of bf16 images on a CPU
without products of bf16, where PyTorch's own is slow.
"""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import convnext_kernels as ck
from convnext_kernels.backends import cpu
from convnext_kernels.interop.adapter import Adapter
from convnext_kernels.models import create_model
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
    accelerated, called = ck.accelerate(copy.deepcopy(model)), []
    x = torch.randn(2, 1, 6, 7, 8).to(memory_format=memory_format)
    for module in accelerated.modules():
        if isinstance(module, Adapter):
            module.register_forward_hook(lambda _m, _x, y: called.append(y))
    calls = fused_calls(lambda: accelerated(x))
    assert (len(called), calls["dwconv3d"], calls["dwconv3d_transposed"]) == (6, 3, 1)
    assert all(y.is_contiguous(memory_format=torch.channels_last_3d) for y in called)  # so that the next layer is fast
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


def test_other_input_runs_the_original():
    """Without a batch, empty, of another dtype under autocast: what PyTorch gives."""
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    model = ck.accelerate(copy.deepcopy(conv))
    for shape in ((4, 5, 6, 7), (0, 4, 5, 6, 7)):
        x = torch.randn(shape)
        assert torch.equal(model(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 4, 5, 6, 7)).dtype == torch.bfloat16


X = torch.randn(2, 3, 32, 32)


def tiny():
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5).eval()


def stem(model):
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.fixture
def slow():
    with cpu.use_isa("portable"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(slow, dtype):
    original = tiny().to(dtype)
    conv = stem(ck.accelerate(copy.deepcopy(original)))
    assert type(conv) is not nn.Conv2d
    x = X.to(dtype, copy=True).requires_grad_()
    y = conv(x)
    plain = stem(original).float()
    expected = plain(x.float()).to(dtype)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y.float().square().sum(), [x, conv.weight, conv.bias])
    wanted = torch.autograd.grad(expected.float().square().sum(), [x, plain.weight, plain.bias])
    torch.testing.assert_close(found, tuple(t.to(dtype) for t in wanted))


def test_restored_and_copied(slow):
    model = ck.accelerate(tiny().bfloat16())
    x = X.bfloat16()
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert torch.equal(torch.compile(stem(model), fullgraph=True, backend="eager")(x), stem(model)(x))
    assert type(stem(ck.restore(model))) is nn.Conv2d


def test_other_machines_and_models_keep_their_convolution(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    assert type(stem(ck.accelerate(tiny()))) is nn.Conv2d
    assert type(stem(create_model("convnext_tiny"))) is nn.Conv2d
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    other = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8))  # nothing else to replace
    assert type(stem(ck.accelerate(other))) is nn.Conv2d


def test_own_networks(slow):
    model = create_model("convnext_tiny").bfloat16()
    conv, x = stem(model), X.bfloat16()
    assert torch.equal(conv(x), copy.deepcopy(conv).float()(x.float()).bfloat16())
    assert torch.equal(conv.float()(X), nn.functional.conv2d(X, conv.weight, conv.bias, stride=4))
