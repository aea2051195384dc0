"""GRN where its sums leave the range of fp16, and where they are zero."""

import pytest
import torch

from tests.operators import OPERATORS, check_forward, check_gradients, gradients, to
from tests.shapes import Case

CASE = Case("V2", n=2, c=24, h=14, w=13, variant="v2", ratio=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [30, 300])
def test_sum_of_squares_beyond_fp16(scale, dtype, kernel):
    """300^2 alone is more than fp16's 65504; the sum over the image is 250 times that."""
    arguments = OPERATORS["grn"].arguments(CASE, dtype)
    arguments["x"] = arguments["x"] * scale
    assert check_forward("grn", arguments, kernel).isfinite().all()


@pytest.mark.parametrize("op", ["mlp", "block"])
def test_large_hidden(op, kernel):
    """The same inside the bottleneck: a hidden of some hundreds."""
    arguments = OPERATORS[op].arguments(CASE, torch.float16)
    arguments["pwconv1_bias"] = arguments["pwconv1_bias"] * 300
    arguments["pwconv2_weight"] = arguments["pwconv2_weight"] / 30
    assert check_forward(op, arguments, kernel).isfinite().all()


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
    check_forward("grn", arguments, backend)
    found = check_gradients("grn", arguments, torch.randn_like(arguments["x"]), backend)
    assert all(gradient.isfinite().all() for gradient in found.values())
