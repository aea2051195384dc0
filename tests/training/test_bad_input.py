"""The backward ops check their gradient and what was kept."""

import pytest
import torch

from tests.operators import OPERATORS, op_calls, with_gradients
from tests.shapes import Case

CASE = Case("small", c=6, h=4, w=3, k=3, ratio=2)


def _backward_arguments(op, backend, **options):
    """The backward op and the arguments that autograd calls it with."""
    arguments = with_gradients(OPERATORS[op].arguments(CASE, torch.float32))
    y = OPERATORS[op].serve(backend, **arguments, **options)
    ((name, given, _),) = op_calls(lambda: y.sum().backward())
    return getattr(torch.ops.convnext_kernels, name), list(given)


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
