"""Which gradients are computed, that they are right (gradcheck), and what is refused (double backward)."""

import itertools

import pytest
import torch

from tests.operators import OPERATORS, differentiable, gradients, op_calls, with_gradients
from tests.shapes import TRITON, VOLUMES, Case, chosen, rows

VARIANTS = {
    "v1": Case("small enough for finite differences", n=2, c=5, h=4, w=3, k=3, ratio=2),
    "v2": Case("the same in V2", n=2, c=5, h=4, w=3, k=3, ratio=2, variant="v2"),
    "simple, mish": Case("another norm and activation", c=5, h=4, w=3, k=3, ratio=2, norm="simple", activation="mish"),
    "rms, silu": Case("RMSNorm in V2", c=5, h=4, w=3, k=3, norm="rms", activation="silu", variant="v2"),
    "drop, no bias": Case(
        "no biases, drop path, dilation", c=3, h=4, w=3, k=3, ratio=1, bias=False, drop=True, dilation=2
    ),
    "stride 2": Case("both phases of both axes, odd sizes", c=3, h=5, w=4, k=(5, 3), stride=2),
    "stride 2, dilated": Case("an even and an odd dilation", c=2, h=5, w=7, k=3, stride=2, dilation=(2, 3)),
    "volume": Case("a volume with stride 2", c=3, d=3, h=5, w=4, k=(3, 1, 5), stride=2, ops=VOLUMES),
}
ROWS = rows(OPERATORS, VARIANTS)


@chosen(lambda op, variant, backend: backend != TRITON or (op != "block" and variant == "v1"))
@pytest.mark.parametrize(("op", "variant"), ROWS)
def test_only_what_is_asked(op, variant, backend):
    """Every single gradient, and every one left out: the same numbers; the others stay None, and are not computed."""
    arguments = OPERATORS[op].arguments(VARIANTS[variant], torch.float32)
    names = differentiable(arguments)
    dy = torch.randn(OPERATORS[op].reference(**arguments).shape)
    full = gradients(lambda **a: OPERATORS[op].serve(backend, **a), arguments, dy)
    for asked in [(n,) for n in names] + list(itertools.combinations(names, len(names) - 1)):
        leaves = {k: v.clone().requires_grad_(k in asked) if k in names else v for k, v in arguments.items()}
        y = OPERATORS[op].serve(backend, **leaves)
        calls = op_calls(lambda y=y: y.backward(dy))
        assert [(name, len(found)) for name, _, found in calls] == [(f"{op}_backward", len(asked))], asked
        for name in names:
            assert (leaves[name].grad is not None) == (name in asked), f"{name}, asked for {asked}"
            if name in asked:
                torch.testing.assert_close(leaves[name].grad, full[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("op", OPERATORS)
def test_double_backward_raises(op):
    arguments = with_gradients(OPERATORS[op].arguments(VARIANTS["v1"], torch.float32))
    y = OPERATORS[op].call(**arguments)
    (dx,) = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"convnext_kernels::{op} cannot be differentiated twice"):
        dx.sum().backward()


@pytest.mark.parametrize("op", OPERATORS)
def test_backward_keeps_the_backend_of_the_forward(op, backend):
    """`use_backend` need not be active any more when the gradients are computed."""
    import convnext_kernels

    arguments = with_gradients(OPERATORS[op].arguments(VARIANTS["v1"], torch.float32))
    with convnext_kernels.use_backend(backend):
        y = OPERATORS[op].serve("auto", **arguments)
    y.sum().backward()
    node = y.grad_fn
    while not hasattr(node, "backend"):
        node = node.next_functions[0][0]
    assert node.backend == backend


def _backward_arguments(op, backend, **options):
    """The backward op and the arguments that autograd calls it with."""
    arguments = with_gradients(OPERATORS[op].arguments(VARIANTS["v1"], torch.float32))
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
