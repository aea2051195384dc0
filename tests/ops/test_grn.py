"""GRN where its sums leave the range of fp16, and where they are zero."""

import pytest
import torch

from tests.operators import OPERATORS, differentiable, gradients, to, with_gradients
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

CASE = Case("V2", n=2, c=24, h=14, w=13, variant="v2", ratio=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [30, 300])
def test_sum_of_squares_beyond_fp16(scale, dtype, kernel):
    """300^2 alone is more than fp16's 65504; the sum over the image is 250 times that."""
    arguments = OPERATORS["grn"].arguments(CASE, dtype)
    arguments["x"] = arguments["x"] * scale
    y = OPERATORS["grn"].serve(kernel, **arguments)
    reference = OPERATORS["grn"].reference(**to(arguments, torch.double))
    assert y.isfinite().all()
    assert_as_good_as_eager(y, OPERATORS["grn"].reference(**arguments), reference)


@pytest.mark.parametrize("op", ["mlp", "block"])
def test_large_hidden(op, kernel):
    """The same inside the bottleneck: a hidden of some hundreds."""
    operator = OPERATORS[op]
    arguments = operator.arguments(CASE, torch.float16)
    arguments["pwconv1_bias"] = arguments["pwconv1_bias"] * 300
    arguments["pwconv2_weight"] = arguments["pwconv2_weight"] / 30
    y = operator.serve(kernel, **arguments)
    reference = operator.reference(**to(arguments, torch.double))
    assert y.isfinite().all()
    assert_as_good_as_eager(y, operator.reference(**arguments), reference, what=op)


def test_gradients_of_large_values(backend):
    arguments = OPERATORS["grn"].arguments(CASE, torch.float16)
    arguments["x"] = arguments["x"] * 300
    dy = torch.randn_like(arguments["x"]) / 300
    actual = gradients(lambda **a: OPERATORS["grn"].serve(backend, **a), arguments, dy)
    reference = gradients(OPERATORS["grn"].reference, to(arguments, torch.double), dy.double())
    for name in actual:
        torch.testing.assert_close(actual[name].double(), reference[name], rtol=4e-3, atol=4e-3, msg=lambda m: m)


@pytest.mark.parametrize("zero", ["everything", "one channel", "one sample"])
def test_zeros(zero, backend):
    """A norm of zero has no gradient of its own; PyTorch takes 0 for it, not NaN."""
    arguments = OPERATORS["grn"].arguments(CASE, torch.float32)
    index = {"everything": ..., "one channel": (slice(None), 3), "one sample": 1}[zero]
    arguments["x"][index] = 0
    arguments = with_gradients(arguments)
    y = OPERATORS["grn"].serve(backend, **arguments)
    torch.testing.assert_close(y, OPERATORS["grn"].reference(**arguments))
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = with_gradients(
        to({k: v.detach() if k in differentiable(arguments) else v for k, v in arguments.items()}, torch.double)
    )
    OPERATORS["grn"].reference(**wide).backward(dy.double())
    for name in differentiable(arguments):
        grad = wide[name].grad
        assert grad.isfinite().all()
        torch.testing.assert_close(arguments[name].grad.double(), grad, rtol=1e-4, atol=1e-4)
