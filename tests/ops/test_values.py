"""Single values: activations and their slopes on a dense grid, and the rounding of 16-bit results."""

import pytest
import torch

from tests.operators import OPERATORS, gradients
from tests.reference import ACTIVATIONS
from tests.shapes import Case

C = 1024


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, kernel):
    """Far beyond where a table or a polynomial ends.

    W1 is zero and W2 the identity: the result is the activation of b1, and b1's gradient its slope.
    """
    case = Case("one pixel", n=1, c=C, h=1, w=1, ratio=1, variant="plain", activation=activation)
    arguments = OPERATORS["mlp"].arguments(case, torch.float32)
    arguments |= {"pwconv1_weight": torch.zeros(C, C), "pwconv2_weight": torch.eye(C)}
    arguments |= {"pwconv2_bias": None, "residual": None}
    at = 4 * torch.arange(C // 4) / C - 0.5 + 1 / 3000  # between the ends of linear pieces, where there is no slope
    grid = torch.cat([24 * at, 6 * at, 0.05 * at, at.sign() * 10 ** (76 * at.abs() - 38).clamp(max=30)])
    arguments["pwconv1_bias"] = grid
    y = OPERATORS["mlp"].serve(kernel, **arguments).flatten()
    dy = torch.ones(1, C, 1, 1)
    slope = gradients(lambda **a: OPERATORS["mlp"].serve(kernel, **a), arguments, dy)["pwconv1_bias"]
    wide = grid.double().requires_grad_()
    exact = ACTIVATIONS[activation](wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    limit = 5e-7 if activation == "gelu" and kernel != "eager" else 1e-6
    assert ((y - exact).abs() / (1 + exact.abs())).max() < limit
    assert (slope - exact_slope).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest_even(dtype, kernel):
    """Every number of the dtype plus a quarter, half or three quarters of the last place of 1, or of other numbers."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    place = torch.finfo(dtype).eps
    bias = torch.tensor([0, 1, place / 4, place / 2, place * 3 / 4, -place / 2, -place * 3 / 4, -3]).to(dtype)
    x, weight = numbers.expand(1, len(bias), 256, 256), torch.ones(len(bias), 1, 1, 1, dtype=dtype)
    y = OPERATORS["dwconv"].serve(kernel, x=x, weight=weight, bias=bias)
    exact = (x.float() + bias.float().view(-1, 1, 1)).to(dtype)
    normal = exact.abs() >= torch.finfo(dtype).tiny  # AVX512_BF16 takes subnormal numbers for zero
    normal |= exact == 0
    assert torch.equal(y[normal], exact[normal])
    assert torch.equal(y.isnan(), exact.isnan())
