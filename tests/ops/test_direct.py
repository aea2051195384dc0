"""Calls that go past PyTorch's dispatcher: whoever wants to see a call still sees it, and nothing stale is used."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from convnext_kernels import FusedConvNeXtBlock, calls, dispatch, functional
from convnext_kernels.ops import registration
from tests.operators import op_calls


@pytest.fixture
def block():
    torch.manual_seed(0)
    return FusedConvNeXtBlock(8, 0.0, 1.0, backend="eager").double()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 8, 5, 6, dtype=torch.float64)


@pytest.fixture
def direct(monkeypatch):
    """The names of the ops that were called without the dispatcher."""
    calls.forget()
    seen, inputs = [], registration._Op.inputs

    def watched(self, name, arguments):
        found = inputs(self, name, arguments)
        if found is not None:
            seen.append(name)
        return found

    monkeypatch.setattr(registration._Op, "inputs", watched)
    yield seen
    calls.forget()


def test_plain_calls_are_direct(block, x, direct):
    with torch.no_grad():
        first = block(x)
        assert torch.equal(block(x), first)
    assert direct == ["block", "block"]
    with torch.inference_mode():
        assert block(x).is_inference()
    # what the dispatcher returns can be changed in place, a view made below autograd could not
    (block(x.requires_grad_()) * 1).add_(1)
    with torch.no_grad():
        block(x).add_(1)
    assert direct == ["block"] * 5


class _Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
def test_observers_see_the_op(block, x, direct, gradient):
    with torch.set_grad_enabled(gradient):
        block(x)  # it is known from here on
        with _Functions() as mode:
            block(x)
        assert any("convnext_kernels.block" in name for name in mode.names)
        assert [name for name, *_ in op_calls(lambda: block(x))] == ["block"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 2.11 warns of what it does with events of other cycles
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                block(x)
            assert any(event.key == "convnext_kernels::block" for event in profile.key_averages())
        block, x = block.float(), x.float()
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(block(x), exact)


def test_options_of_other_types_are_converted(x, direct):
    weight = torch.randn(8, 1, 3, 3, dtype=torch.float64)
    expected = functional.depthwise_conv2d(x, weight, backend="eager")
    assert torch.equal(functional.depthwise_conv2d(x, weight, dilation=True, backend="eager"), expected)
    norm = torch.ones(8, dtype=torch.float64)
    one = functional.layer_norm2d(x, norm, norm, eps=1.0, backend="eager")
    assert torch.equal(functional.layer_norm2d(x, norm, norm, eps=1, backend="eager"), one)
    assert direct == ["dwconv", "layernorm"]


def test_changed_parameters(block, x, direct):
    """After a swap of the data the checks run again; a frozen parameter gets no gradient."""
    inner = block.pwconv1
    block(x).sum().backward()
    inner.weight.requires_grad_(False)
    block.zero_grad()
    block(x).sum().backward()
    assert inner.weight.grad is None
    assert block.pwconv2.weight.grad is not None
    inner.weight.data = inner.weight.data.float()
    with pytest.raises(TypeError, match="pwconv1_weight"):
        block(x)
    inner.weight.data = torch.zeros(32, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="pwconv1_weight"):
        block(x)


def test_computed_parameters(block, x):
    """A parametrised weight is no parameter of its module any more."""
    expected = block(x)
    block.gamma = nn.Parameter(block.gamma.detach() / 2)

    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    nn.utils.parametrize.register_parametrization(block, "gamma", Double())
    torch.testing.assert_close(block(x), expected)


class _OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    index = 0

    is_cuda = True
    device = property(lambda self: torch.device("cuda", self.index))

    def get_device(self):
        return self.index


def test_devices_have_signatures_of_their_own(x, monkeypatch):
    """Kernels are loaded on one GPU; the current one is that of the first argument."""
    at_0, at_1 = (x.as_subclass(_OnGpu) for _ in range(2))
    at_1.index = 1
    first, second, again = (calls.inputs("dwconv", (t, 1)).signature for t in (at_0, at_1, at_0))
    assert first is again
    assert first is not second
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    run = registration.on_device(lambda inputs, t: t)
    run(None, at_0)
    assert not entered
    run(None, at_1)
    assert entered == [torch.device("cuda", 1)]


def test_forget_forgets_what_the_extension_repeats():
    if dispatch.cpu_extension() is None:
        pytest.skip("the CPU kernels are not compiled")
    block, x = FusedConvNeXtBlock(8, backend="cpu"), torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.no_grad():
            for _ in range(3):
                y = block(x)
            assert calls.repeat is not calls.never
            assert torch.equal(block(x), y)
        calls.forget()
        assert calls.repeat is calls.never
