"""Depthwise convolutions of volumes in other models: MedNeXt's blocks, in this file's own words."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.interop.adapter import Adapter
from convnext_kernels.nn import DepthwiseConv3d
from tests.tolerance import randomize_


class MedNeXtBlock(nn.Module):
    """Of arXiv 2303.09975, with the names of the authors' code and of MONAI's; to halve and to double a volume too."""

    def __init__(self, channels, out, kernel=3, ratio=2, conv=nn.Conv3d, stride=1, grn=False):
        super().__init__()
        self.conv1 = conv(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.norm = nn.GroupNorm(channels, channels)
        self.conv2 = nn.Conv3d(channels, ratio * channels, 1)
        self.act = nn.GELU()
        self.conv3 = nn.Conv3d(ratio * channels, out, 1)
        self.residual = stride == 1
        self.gamma = nn.Parameter(torch.zeros(1, ratio * channels, 1, 1, 1)) if grn else None

    def forward(self, x):
        y = self.act(self.conv2(self.norm(self.conv1(x))))
        if self.gamma is not None:
            energy = torch.linalg.vector_norm(y, dim=(2, 3, 4), keepdim=True)
            y = y + self.gamma * (y * (energy / (energy.mean(1, keepdim=True) + 1e-6)))
        y = self.conv3(y)
        return x + y if self.residual else y


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
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    rows = {row.name: row for row in ck.acceleration_report(accelerated).rows}
    assert set(rows) == {"1.conv1", "2.conv1", "3.conv1"}
    assert {(row.type, row.kind, row.replaced) for row in rows.values()} == {("Conv3d", "depthwise convolution", True)}
    assert [*accelerated.state_dict()] == [*model.state_dict()]
    ck.restore(accelerated)
    assert not any(isinstance(module, Adapter) for module in accelerated.modules())
    torch.testing.assert_close(accelerated(x), model(x), rtol=0, atol=0)


def test_the_op_is_called():
    """Once for each replaced convolution, and its result is channels_last_3d, so that the layers after it are fast."""
    model = ck.accelerate(network())
    called = []
    for module in model.modules():
        if isinstance(module, Adapter):
            module.register_forward_hook(lambda _m, _x, y: called.append(y))
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.randn(1, 1, 6, 7, 8))
    assert len(called) == 3
    assert all(y.is_contiguous(memory_format=torch.channels_last_3d) for y in called)
    names = [event.name for event in profile.events()]
    assert names.count("convnext_kernels::dwconv3d") == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 9, "padding": 4}, "the kernel size (9, 9, 9) is not odd and at most 7"),
        ({"kernel_size": 3, "padding": 1, "stride": (1, 2, 2)}, "has stride (1, 2, 2)"),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, "has dilation (2, 2, 2)"),
        ({"kernel_size": 3}, "the padding (0, 0, 0), 'zeros' does not keep the size"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, "'circular' does not keep the size with zeros"),
    ],
)
def test_what_is_not_replaced(options, reason):
    conv = nn.Conv3d(4, 4, groups=4, **options)
    ck.accelerate(conv)
    assert type(conv) is nn.Conv3d
    (row,) = ck.acceleration_report(conv).rows
    assert not row.replaced
    assert reason in row.reason


def test_other_convolutions_of_volumes_are_not_listed():
    assert not ck.acceleration_report(nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv3d(4, 8, 3, groups=4))).rows
    (row,) = ck.acceleration_report(DepthwiseConv3d(4)).rows
    assert row.reason == "already a fused depthwise convolution"


def test_other_input_runs_the_original():
    """Without a batch, empty, of another dtype under autocast: what PyTorch gives."""
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    model = ck.accelerate(copy.deepcopy(conv))
    for shape in ((4, 5, 6, 7), (0, 4, 5, 6, 7)):
        x = torch.randn(shape)
        assert torch.equal(model(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 4, 5, 6, 7)).dtype == torch.bfloat16
