"""Depthwise convolutions of volumes in other models: MedNeXt's blocks."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.interop.adapter import Adapter
from tests.interop.official import LayerNorm, MedNeXtBlock
from tests.tolerance import assert_as_good_as_eager, randomize_


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
    "volume, LayerNorm": {"norm": LayerNorm(6, data_format="channels_first")},
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


def test_other_input_runs_the_original():
    """Without a batch, empty, of another dtype under autocast: what PyTorch gives."""
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    model = ck.accelerate(copy.deepcopy(conv))
    for shape in ((4, 5, 6, 7), (0, 4, 5, 6, 7)):
        x = torch.randn(shape)
        assert torch.equal(model(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 4, 5, 6, 7)).dtype == torch.bfloat16
