"""The stem's convolution of bf16 images on a CPU without products of bf16, where PyTorch's own is slow."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import convnext_kernels as ck
from convnext_kernels.backends import cpu
from convnext_kernels.models import create_model

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
