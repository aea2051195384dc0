"""`torch.compile`: one graph, forward and backward; another batch or image size does not compile again."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from convnext_kernels import FusedConvNeXtBlock
from tests.operators import OPERATORS, differentiable, with_gradients
from tests.shapes import Case, chosen
from tests.tolerance import randomize_


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _step(block, x):
    x = x.detach().requires_grad_()
    y = block(x)
    y.square().mean().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in block.named_parameters()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_grn": True}, {"norm": "simple", "activation": "silu"}],
    ids=["v1", "v2", "SimpleNorm and SiLU"],
)
def test_block(options, memory_format):
    block = randomize_(FusedConvNeXtBlock(8, kernel_size=3, **options))
    counter = CompileCounterWithBackend("aot_eager")
    compiled_block = copy.deepcopy(block)
    compiled = torch.compile(compiled_block, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for n, h, w in ((2, 6, 5), (3, 7, 9), (5, 4, 4)):
        x = torch.randn(n, 8, h, w).contiguous(memory_format=memory_format)
        y, dx, grads = _step(block, x)
        compiled_x = x.detach().requires_grad_()
        compiled_y = compiled(compiled_x)
        compiled_y.square().mean().backward()
        torch.testing.assert_close(compiled_y, y)
        assert compiled_y.stride() == y.stride()
        torch.testing.assert_close(compiled_x.grad, dx)
        for name, p in compiled_block.named_parameters():
            torch.testing.assert_close(p.grad, grads[name], msg=lambda m, name=name: f"{name}: {m}")
        block.zero_grad()
        compiled_block.zero_grad()
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "compiled again for another size"


@chosen(lambda backend: backend[0] == "cpu")
def test_block_with_inductor(backend):
    block = randomize_(FusedConvNeXtBlock(8, kernel_size=3, backend=backend))
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    y, dx, _ = _step(block, x)
    compiled_x = x.detach().requires_grad_()
    # On a CPU without CUDA graphs, which need the same: one whole graph.
    compiled_y = torch.compile(block, fullgraph=True, mode="reduce-overhead")(compiled_x)
    compiled_y.square().mean().backward()
    torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close(compiled_x.grad, dx)


def test_drop_path_in_training():
    block = randomize_(FusedConvNeXtBlock(4, drop_path=0.5, kernel_size=3)).train()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 4, 3, 3)
    y = compiled(x)
    dropped = (y == x).flatten(1).all(1)
    assert 8 < dropped.sum() < 56


@pytest.mark.parametrize("op", OPERATORS)
def test_function_of_any_size(op):
    operator = OPERATORS[op]
    compiled = torch.compile(lambda a: operator.call(**a), fullgraph=True, dynamic=True, backend="aot_eager")
    counters.clear()
    # At first all sizes differ, also from the numbers of channels: compiled code takes equal ones to be always equal.
    for n, h, w in ((5, 11, 13), (3, 14, 10), (7, 12, 12)):
        arguments = with_gradients(operator.arguments(Case("small", n=n, c=6, h=h, w=w, k=3, ratio=2), torch.float32))
        names = differentiable(arguments)
        y, expected = compiled(arguments), operator.call(**arguments)
        torch.testing.assert_close(y, expected)
        actual = torch.autograd.grad(y.square().sum(), [arguments[name] for name in names])
        wanted = torch.autograd.grad(expected.square().sum(), [arguments[name] for name in names])
        torch.testing.assert_close(actual, wanted)
    assert counters["stats"]["unique_graphs"] == 1, "compiled again for another size"


def test_bad_input_raises_while_compiling():
    """The fake kernels check what the real ones check."""
    compiled = torch.compile(OPERATORS["dwconv"].call, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="odd kernel sizes from 1 to 51, got 4"):
        compiled(torch.randn(1, 2, 5, 5), torch.randn(2, 1, 4, 4))
