"""Vocos' blocks over time with a condition for each sample."""

import copy

import pytest
import torch

import convnext_kernels as ck
from tests.interop.helpers import fused_calls
from tests.interop.official import ConvNeXtBlock
from tests.tolerance import randomize_

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def pair(count=None):
    original = randomize_(ConvNeXtBlock(12, 40, count=count)).double()
    return original, ck.accelerate(copy.deepcopy(original))


@pytest.fixture
def x():
    return torch.randn(3, 12, 29, dtype=torch.double)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_condition_for_each_sample(compiled, x):
    """Also where two samples share one, and where values cannot be read, as in a compiled graph and on a GPU."""
    original, accelerated = pair(4)
    run = torch.compile(accelerated, fullgraph=True, backend="aot_eager") if compiled else accelerated
    data, ids, results = x, torch.tensor([[3], [1], [3]]), []
    for module in (original, run):
        x = data.clone().requires_grad_()
        y = module(x, ids)
        inputs = [x, *original.parameters()] if module is original else [x, *accelerated.parameters()]
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_one_call_for_all_samples(x):
    _, accelerated = pair(4)
    for ids, ops in (([[3], [3], [3]], ["block"]), ([[3], [1], [3]], ["dwconv", "layernorm", "mlp"])):
        assert fused_calls(lambda ids=ids: accelerated(x, torch.tensor(ids))) == dict.fromkeys(ops, 1)


def test_a_condition_is_no_constant_of_a_compiled_graph(x):
    original, accelerated = pair(4)
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    for index in (1, 3):
        condition = torch.tensor([index])
        torch.testing.assert_close(compiled(x, cond_embedding_id=condition), original(x, condition))
