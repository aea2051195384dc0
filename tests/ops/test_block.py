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
    if variant == "plain":
        arguments["drop_scale"] = arguments["drop_scale"].view(-1, 1, 1, 1)
    y = OPERATORS["block"].serve(kernel, **arguments)
    assert torch.equal(y[[0, 2]], arguments["x"][[0, 2]])
    assert (y[[1, 3, 4]] != arguments["x"][[1, 3, 4]]).any(1).all()


@chosen(lambda dtype, kernel: dtype != torch.float16 and kernel != TRITON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_widths(dtype, kernel):
    """Every number of channels around the vector and tile sizes, at a shape too small for the table."""
    for c in (2, 5, 7, 9, 31, 32, 33, 47, 49, 63, 65, 95, 97):
        for ratio in (1, 3):
            arguments = OPERATORS["block"].arguments(Case("", n=1, c=c, h=3, w=5, k=3, ratio=ratio), dtype)
            check_forward("block", arguments, kernel, what=f"C={c}, ratio {ratio}")
