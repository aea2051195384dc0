"""`torch.compile`: one graph, forward and backward; another batch or image size does not compile again."""

import pytest
import torch
from torch._dynamo.utils import counters

from convnext_kernels import FusedConvNeXtBlock
from tests.operators import OPERATORS, differentiable, laid_out, with_gradients
from tests.shapes import Case, chosen
from tests.tolerance import randomize_

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@chosen(lambda backend: backend[0] == "cpu")
def test_block_with_inductor(backend):
    block = randomize_(FusedConvNeXtBlock(8, kernel_size=3, backend=backend))
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    # On a CPU without CUDA graphs, which need the same: one whole graph.
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    results = []
    for module in (block, compiled):
        y = module(x.requires_grad_())  # alone: Inductor has no C++ to compile
        results.append((y, *torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))))
    torch.testing.assert_close(*results)


def test_drop_path_in_training():
    block = randomize_(FusedConvNeXtBlock(4, drop_path=0.5, kernel_size=3)).train()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 4, 3, 3)
    y = compiled(x)
    dropped = (y == x).flatten(1).all(1)
    assert 8 < dropped.sum() < 56


@pytest.mark.parametrize(
    ("op", "variant", "memory_format"),
    [
        *((op, "v1", torch.channels_last) for op in OPERATORS),
        ("block", "v2", torch.contiguous_format),
        ("downsample", "v1", torch.contiguous_format),
    ],
)
def test_function_of_any_size(op, variant, memory_format):
    operator = OPERATORS[op]
    compiled = torch.compile(lambda a: operator.call(**a), fullgraph=True, dynamic=True, backend="aot_eager")
    counters.clear()
    # At first all sizes differ, also from the numbers of channels: compiled code takes equal ones to be always equal.
    for n, h, w in ((5, 11, 13), (3, 14, 10), (7, 12, 12)):
        case = Case("small", n=n, c=6, h=h, w=w, k=3, ratio=2, variant=variant)
        arguments = operator.arguments(case, torch.float32)
        arguments["x"] = laid_out(arguments["x"], memory_format)
        arguments = with_gradients(arguments)
        names = differentiable(arguments)
        y, expected = compiled(arguments), operator.call(**arguments)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        actual = torch.autograd.grad(y.square().sum(), [arguments[name] for name in names])
        wanted = torch.autograd.grad(expected.square().sum(), [arguments[name] for name in names])
        torch.testing.assert_close(actual, wanted)
    assert counters["stats"]["unique_graphs"] == 1, "compiled again for another size"
