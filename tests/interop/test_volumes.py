"""Depthwise convolutions of volumes in other models: MedNeXt's blocks, in this file's own words."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.interop.adapter import Adapter
from convnext_kernels.nn import DepthwiseConv3d
from tests.tolerance import assert_as_good_as_eager, randomize_


class LayerNorm(nn.Module):
    """Over channels, as the authors' code has it."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps, self.data_format = 1e-6, "channels_first"

    def forward(self, x):
        x = nn.functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class MedNeXtBlock(nn.Module):
    """Of arXiv 2303.09975, with the names of the authors' code; to halve and to double a volume too."""

    def __init__(self, channels, out, kernel=3, ratio=2, conv=nn.Conv3d, stride=1, grn=False, norm=None, act=nn.GELU):
        super().__init__()
        flat = nn.Conv2d if conv is nn.Conv2d else nn.Conv3d
        self.conv1 = conv(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.norm = norm or nn.GroupNorm(channels, channels)
        self.conv2 = flat(channels, ratio * channels, 1)
        self.act = act()
        self.conv3 = flat(ratio * channels, out, 1)
        self.do_res = stride == 1
        if grn:
            shape = (1, ratio * channels, *[1] * len(self.conv1.kernel_size))
            self.grn_gamma, self.grn_beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        y = self.act(self.conv2(self.norm(self.conv1(x))))
        if hasattr(self, "grn_gamma"):
            energy = torch.linalg.vector_norm(y, dim=tuple(range(2, y.dim())), keepdim=True)
            y = self.grn_gamma * (y * (energy / (energy.mean(1, keepdim=True) + 1e-6))) + self.grn_beta + y
        y = self.conv3(y)
        return x + y if self.do_res else y


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
    found = {name: (row.type, row.kind, row.replaced) for name, row in rows.items()}
    assert found == {
        "1": ("MedNeXtBlock", "block", True),
        "2": ("MedNeXtBlock", "block", False),
        "2.conv1": ("Conv3d", "depthwise convolution", True),
        "2.norm": ("GroupNorm", "group norm", True),
        "3": ("MedNeXtBlock", "block", True),
        "4": ("MedNeXtBlock", "block", False),
        "4.conv1": ("ConvTranspose3d", "depthwise convolution", True),
        "4.norm": ("GroupNorm", "group norm", True),
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
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.randn(1, 1, 6, 7, 8))
    assert len(called) == 6
    assert all(y.is_contiguous(memory_format=torch.channels_last_3d) for y in called)
    names = [event.name for event in profile.events()]
    assert names.count("convnext_kernels::dwconv3d") == 3
    assert names.count("convnext_kernels::dwconv3d_transposed") == 1


BLOCKS = {
    "volume": {},
    "volume, GRN, SiLU": {"grn": True, "kernel": 5, "act": nn.SiLU},
    "volume, LayerNorm": {"norm": LayerNorm(6)},
    "image, K 7": {"conv": nn.Conv2d, "kernel": 7},
}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind, dtype, backend):
    """Result and gradients are as close to fp64 as the original's."""
    model = randomize_(MedNeXtBlock(6, 6, **copy.deepcopy(BLOCKS[kind]))).to(dtype)
    wide = copy.deepcopy(model).double()
    accelerated = ck.accelerate(copy.deepcopy(model), backend=backend)
    x = torch.randn(2, 6, *(5, 7, 8)[: len(model.conv1.kernel_size)], dtype=dtype)
    reference, expected = step(wide, x.double())
    eager, eager_gradients = step(model, x)
    y, gradients = step(accelerated, x)
    assert isinstance(accelerated, Adapter)
    assert_as_good_as_eager(y, eager, reference)
    for name, gradient in gradients.items():
        # The norm removes a constant: the convolution's bias has a gradient of rounding errors only
        if name != "conv1.bias":
            assert_as_good_as_eager(gradient, eager_gradients[name], expected[name], what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_compile(dtype):
    """The dtype of the original, and one graph without breaks."""
    model = randomize_(MedNeXtBlock(6, 6))
    accelerated = ck.accelerate(copy.deepcopy(model))
    x = torch.randn(1, 6, 5, 6, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = accelerated(x), model(x)
        compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == expected.dtype == compiled.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)
    assert torch.equal(compiled, y)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": nn.GroupNorm(3, 6)}, "the norm has 3 groups of 6 channels"),
        ({"norm": nn.BatchNorm3d(6)}, "the norm is a BatchNorm3d"),
        ({"act": nn.ELU}, "the activation is ELU(alpha=1.0)"),
    ],
)
def test_blocks_that_are_not_replaced(options, reason):
    """The report says why; the convolution in them is replaced."""
    model = ck.accelerate(MedNeXtBlock(6, 6, **options))
    block, conv, *_ = ck.acceleration_report(model).rows
    assert not block.replaced
    assert reason in block.reason
    assert conv.replaced


def test_another_forward_is_found():
    class Doubled(MedNeXtBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    block, conv, _ = ck.acceleration_report(ck.accelerate(Doubled(6, 6))).rows
    assert "computes something else" in block.reason
    assert conv.replaced


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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 3, "padding": 1}, "has stride (3, 3, 3) and dilation (1, 1, 1), not 2 and 1"),
        ({"stride": 2}, "has padding (0, 0, 0) and output padding (0, 0, 0)"),
        (
            {"stride": 2, "padding": 1, "output_padding": (1, 0, 0)},
            "and output padding (1, 0, 0)",
        ),
    ],
)
def test_what_is_not_replaced_of_transposed_ones(options, reason):
    (row,) = ck.acceleration_report(nn.ConvTranspose3d(4, 4, 3, groups=4, **options)).rows
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
