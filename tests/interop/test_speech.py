"""Blocks over time: Vocos' and F5-TTS', in this file's own words, with their names, layouts and options."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.interop.adapter import Adapter
from tests.interop.helpers import fused_calls
from tests.tolerance import randomize_


class AdaLayerNorm(nn.Module):
    def __init__(self, count, dim):
        super().__init__()
        self.eps, self.dim = 1e-6, dim
        self.scale, self.shift = nn.Embedding(count, dim), nn.Embedding(count, dim)

    def forward(self, x, cond_embedding_id):
        y = nn.functional.layer_norm(x, (self.dim,), eps=self.eps)
        return y * self.scale(cond_embedding_id) + self.shift(cond_embedding_id)


class GRN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x):
        energy = x.norm(dim=1, keepdim=True)
        return self.gamma * (x * (energy / (energy.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """Vocos': (N, C, L)."""

    def __init__(self, dim, hidden, layer_scale=0.5, count=None):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = AdaLayerNorm(count, dim) if count else nn.LayerNorm(dim, eps=1e-6)
        self.adanorm = count is not None
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None

    def forward(self, x, cond_embedding_id=None):
        y = self.dwconv(x).transpose(1, 2)
        if self.adanorm:
            assert cond_embedding_id is not None
            y = self.norm(y, cond_embedding_id)
        else:
            y = self.norm(y)
        y = self.pwconv2(self.act(self.pwconv1(y)))
        return x + (y if self.gamma is None else self.gamma * y).transpose(1, 2)


class ConvNeXtV2Block(nn.Module):
    """F5-TTS': (N, L, C)."""

    def __init__(self, dim, hidden, dilation=1):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3 * dilation, dilation=dilation, groups=dim)
        self.norm, self.grn = nn.LayerNorm(dim, eps=1e-6), GRN(hidden)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        y = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.pwconv2(self.grn(self.act(self.pwconv1(y))))


class Doubled(ConvNeXtBlock):
    """Looks like Vocos' block, but computes something else."""

    def forward(self, x, cond_embedding_id=None):
        return 2 * super().forward(x)


MAKE = {
    "vocos": lambda: ConvNeXtBlock(12, 40),
    "vocos without layer scale": lambda: ConvNeXtBlock(12, 36, layer_scale=0),
    "vocos with AdaLayerNorm": lambda: ConvNeXtBlock(12, 40, count=4),
    "f5": lambda: ConvNeXtV2Block(12, 24),
    "f5 dilated": lambda: ConvNeXtV2Block(12, 24, dilation=3),
}


def pair(name):
    original = randomize_(MAKE[name]()).double()
    return original, ck.accelerate(copy.deepcopy(original))


def image(name):
    shape = (3, 29, 12) if name.startswith("f5") else (3, 12, 29)
    return torch.randn(shape, dtype=torch.double)


@pytest.mark.parametrize("name", MAKE)
def test_values_and_gradients(name):
    original, accelerated = pair(name)
    assert isinstance(accelerated, Adapter)
    assert accelerated.state_dict().keys() == original.state_dict().keys()
    options = {"cond_embedding_id": torch.tensor([2])} if "Ada" in name else {}
    data, results = image(name), []
    for module in (original, accelerated):
        x = data.clone().requires_grad_()
        y = module(x, **options)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.sin(torch.arange(y.numel())).view_as(y))
        results.append((y, *gradients))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert type(ck.restore(accelerated)) is type(original)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_condition_for_each_sample(compiled):
    """Also where two samples share one, and where values cannot be read, as in a compiled graph and on a GPU."""
    torch._dynamo.reset()
    original, accelerated = pair("vocos with AdaLayerNorm")
    run = torch.compile(accelerated, fullgraph=True, backend="aot_eager") if compiled else accelerated
    data, ids, results = image("vocos"), torch.tensor([[3], [1], [3]]), []
    for module in (original, run):
        x = data.clone().requires_grad_()
        y = module(x, ids)
        inputs = [x, *original.parameters()] if module is original else [x, *accelerated.parameters()]
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_one_call_for_all_samples():
    _, accelerated = pair("vocos with AdaLayerNorm")
    x = image("vocos")
    for ids, ops in (([[3], [3], [3]], ["block"]), ([[3], [1], [3]], ["dwconv", "layernorm", "mlp"])):
        assert fused_calls(lambda ids=ids: accelerated(x, torch.tensor(ids))) == dict.fromkeys(ops, 1)


def test_what_is_not_replaced():
    strided = ConvNeXtBlock(12, 40)
    strided.dwconv = nn.Conv1d(12, 12, 7, stride=2, padding=3, groups=12)
    longer = ConvNeXtBlock(12, 40)
    longer.drop = nn.Dropout()
    for module, words in (
        (Doubled(12, 40), "computes something else"),
        (strided, "stride (2,)"),
        (longer, "it has dwconv, norm, pwconv1, act, pwconv2, drop, gamma"),
    ):
        (row,) = ck.acceleration_report(module).rows
        assert not row.replaced
        assert words in row.reason


def test_a_condition_is_no_constant_of_a_compiled_graph():
    torch._dynamo.reset()
    original, accelerated = pair("vocos with AdaLayerNorm")
    compiled, x = torch.compile(accelerated, fullgraph=True, backend="aot_eager"), image("vocos")
    for index in (1, 3):
        condition = torch.tensor([index])
        torch.testing.assert_close(compiled(x, cond_embedding_id=condition), original(x, condition))


def test_exported_and_traced_by_fx():
    _, accelerated = pair("vocos")
    x = image("vocos")
    exported = torch.export.export(accelerated, (x,)).module()
    torch.testing.assert_close(exported(x), accelerated(x))
    network = nn.Sequential(accelerated)
    traced = torch.fx.symbolic_trace(network)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(traced(x), network(x))
