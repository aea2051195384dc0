"""What is special about the whole block: dropped samples, and independence of the samples from each other."""

import pytest
import torch

from tests.operators import OPERATORS, check_forward
from tests.shapes import DTYPES, TRITON, Case, chosen


@chosen(lambda dtype, kernel: dtype == torch.bfloat16 or kernel != TRITON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["v1", "v2", "plain"])
def test_dropped_samples_are_x_bit_for_bit(variant, dtype, kernel):
    arguments = OPERATORS["block"].arguments(Case("drop", n=5, variant=variant), dtype)
    arguments["drop_scale"] = torch.tensor([0, 1.25, 0, 1.25, 1.25], dtype=dtype)
    y = OPERATORS["block"].serve(kernel, **arguments)
    assert torch.equal(y[[0, 2]], arguments["x"][[0, 2]])
    assert (y[[1, 3, 4]] != arguments["x"][[1, 3, 4]]).any(1).all()


def test_shape_of_drop_scale(kernel):
    arguments = OPERATORS["block"].arguments(Case("drop", n=3, drop=True), torch.float32)
    flat = OPERATORS["block"].serve(kernel, **arguments)
    arguments["drop_scale"] = arguments["drop_scale"].view(-1, 1, 1, 1)
    assert torch.equal(OPERATORS["block"].serve(kernel, **arguments), flat)


@chosen(lambda dtype, kernel: dtype != torch.float16 and kernel != TRITON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_widths(dtype, kernel):
    """Every number of channels around the vector and tile sizes, at a shape too small for the table."""
    for c in (2, 5, 7, 9, 31, 32, 33, 47, 49, 63, 65, 95, 97):
        for ratio in (1, 3):
            arguments = OPERATORS["block"].arguments(Case("", n=1, c=c, h=3, w=5, k=3, ratio=ratio), dtype)
            check_forward("block", arguments, kernel, what=f"C={c}, ratio {ratio}")


@chosen(lambda dtype, kernel: dtype == torch.float32 or kernel != TRITON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_over_its_whole_range(dtype, kernel):
    """Exact GELU on a dense grid from -12 to 12, far beyond where a table or a polynomial ends.

    LayerNorm of one channel gives its bias, which W1 turns into the grid; W2 reads out one value per channel.
    """
    hidden = 2048
    grid = torch.linspace(-12, 12, hidden, dtype=torch.double).to(dtype)
    arguments = OPERATORS["mlp"].arguments(Case("", n=1, c=1, h=1, w=1, variant="plain", bias=False), dtype)
    arguments |= {
        "residual": None,
        "norm_bias": torch.zeros(1, dtype=dtype),
        "pwconv1_weight": torch.zeros(hidden, 1, dtype=dtype),
        "pwconv1_bias": grid,
    }
    for start in range(0, hidden, 61):
        select = torch.zeros(1, hidden, dtype=dtype)
        select[0, start] = 1
        y = OPERATORS["mlp"].serve(kernel, **(arguments | {"pwconv2_weight": select}))
        exact = torch.nn.functional.gelu(grid[start].double())
        # absolute near 0 and in the negative tail, where GELU itself goes to 0; 2 eps of the result elsewhere
        allowed = (8e-6 if dtype == torch.bfloat16 else 6e-7) + 2 * torch.finfo(dtype).eps * exact.abs()
        assert (y.double().squeeze() - exact).abs() <= allowed, f"gelu({grid[start]}) = {y.item()}, not {exact}"
