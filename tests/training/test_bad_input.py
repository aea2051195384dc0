"""Mistakes in training: a clear error each, and afterwards everything still works."""

import pytest
import torch

from convnext_kernels import FusedConvNeXtBlock
from tests.operators import OPERATORS, with_gradients
from tests.shapes import Case
from tests.tolerance import randomize_

CASE = Case("small", c=6, h=4, w=3, k=3, ratio=2)


def _block(backend, **options):
    return randomize_(FusedConvNeXtBlock(6, kernel_size=3, mlp_ratio=2, backend=backend, **options))


def _still_works(block):
    x = torch.randn(2, 6, 4, 3, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("memory", ["auto", "min", "balanced"])
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_backward_twice(use_grn, memory, backend):
    block = _block(backend, use_grn=use_grn, memory=memory)
    loss = block(torch.randn(2, 6, 4, 3)).square().sum()
    loss.backward()
    once = {k: p.grad.clone() for k, p in block.named_parameters()}
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    for key, p in block.named_parameters():
        assert torch.equal(p.grad, once[key]), f"{key} changed"
    _still_works(block)


def _backward_arguments(op, backend, **options):
    """The backward op and the arguments that autograd calls it with."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == f"convnext_kernels::{op}_backward":
                calls.append(args)
            return func(*args, **(kwargs or {}))

    arguments = with_gradients(OPERATORS[op].arguments(CASE, torch.float32))
    y = OPERATORS[op].serve(backend, **arguments, **options)
    with Recorder():
        y.sum().backward()
    return getattr(torch.ops.convnext_kernels, f"{op}_backward"), list(calls[0])


@pytest.mark.parametrize("op", OPERATORS)
def test_the_backward_op_checks_its_gradient(op, backend):
    """Shape and dtype: kernels that see addresses alone would read beyond them."""
    backward, arguments = _backward_arguments(op, backend)
    dy, rest = arguments[0], arguments[1:]
    backward(dy, *rest)
    with pytest.raises(ValueError, match=r"d(y|out): expected .*shape.*got \(.*, 1, \d+\)"):
        backward(dy[..., :1, :].contiguous(), *rest)
    with pytest.raises(TypeError, match=r"d(y|out): expected float32, got bfloat16"):
        backward(dy.bfloat16(), *rest)


@pytest.mark.parametrize("memory", ["min", "balanced"])
@pytest.mark.parametrize("op", ["mlp", "block"])
def test_the_backward_op_checks_what_was_kept(op, memory, backend):
    if backend == "eager":
        pytest.skip("eager keeps nothing")
    backward, arguments = _backward_arguments(op, backend, memory=memory)
    (at,) = [i for i, a in enumerate(arguments) if isinstance(a, list) and all(isinstance(t, torch.Tensor) for t in a)]
    if not arguments[at]:
        pytest.skip("nothing is kept of this op")
    for wrong in (arguments[at][-1][:1], arguments[at][-1].double()):
        changed = list(arguments)
        changed[at] = [*arguments[at][:-1], wrong]
        with pytest.raises((TypeError, ValueError), match="saved"):
            backward(*changed)
    with pytest.raises(ValueError, match="saved: expected at most"):
        backward(*arguments[:at], arguments[at] * 3, *arguments[at + 1 :])
