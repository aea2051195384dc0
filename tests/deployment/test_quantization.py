"""Quantised weights: the models compute with them, or say why not."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels.models import ConvNeXt
from convnext_kernels.ops import registration
from tests.interop.helpers import MODELS, fused_calls, images, logits
from tests.tolerance import randomize_


class Rounded(Tensor):
    """A weight that only `F.linear` knows, as torchao's are: 8-bit numbers and a scale."""

    @staticmethod
    def __new__(cls, t):
        made = Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, requires_grad=False)
        made.scale = t.detach().abs().amax(1, keepdim=True) / 127
        made.codes = (t.detach() / made.scale).round().to(torch.int8)
        return made

    def dequantised(self):
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is nn.functional.linear:
            x, weight, bias = (*arguments, None)[:3]
            return nn.functional.linear(x, weight.dequantised(), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(keywords or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return arguments[0]
        raise NotImplementedError(f"Rounded has no {function}")


def own(**options):
    return randomize_(ConvNeXt((1, 1), (8, 16), num_classes=5, use_grn=True, **options)).eval()


def quantise_(model):
    """Replace the weights of all Linear layers but the last; return a copy with the same values in full."""
    full = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][:-1]:
        layer.weight = nn.Parameter(Rounded(layer.weight), requires_grad=False)
        full.get_submodule(name).weight.data = layer.weight.dequantised()
    return full


@pytest.fixture
def log(caplog):
    registration._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="convnext_kernels"):
        yield caplog
    registration._log_once.cache_clear()


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
def test_own_network(log, gradient):
    model, x = own(), images(dtype=torch.float32)
    full = quantise_(model)
    with torch.set_grad_enabled(gradient):
        y = model(x)
        model(x)
        torch.testing.assert_close(y, full(x))
    line = "block: tensors of class Rounded do not implement convnext_kernels::block; PyTorch's operators compute it"
    assert log.messages == [line]
    if gradient:
        gradients = []
        for m in (model, full):
            m(x).square().sum().backward()
            gradients.append(m.stages[0][0].dwconv.weight.grad)
        torch.testing.assert_close(*gradients)


def test_a_backend_by_name_refuses():
    model = own(backend="cpu" if ck.list_backends()["cpu"].available else "triton")
    quantise_(model)
    with pytest.raises(
        ck.BackendError, match="block: tensors of class Rounded do not implement convnext_kernels::block"
    ):
        model(images(dtype=torch.float32))


def test_accelerated_model_runs_its_own_forward():
    model, x = ck.accelerate(MODELS["timm-v1"].make(dtype=torch.float32)), images(dtype=torch.float32)
    full = quantise_(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, x), logits(full, x))
        assert fused_calls(lambda: model(x))["block"] == 0


def test_a_replaced_layer_is_named():
    """A quantised layer, or LoRA's, whose weight is not all that it computes."""
    block = ck.FusedConvNeXtBlock(8)
    block.pwconv2 = nn.Sequential(block.pwconv2)
    with pytest.raises(TypeError, match=r"pwconv2: expected a torch.nn.Linear, got torch\.nn\..*Sequential"):
        block(torch.randn(1, 8, 5, 5))
