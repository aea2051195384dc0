"""What is special about the depthwise convolution: its borders."""

import pytest
import torch

from tests.operators import OPERATORS


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("k", [3, 5, 7, 13])
def test_every_tap_lands_where_it_should(k, dilation, kernel):
    """One lit pixel in each corner and in the middle: the result is the flipped kernel, cut at the borders."""
    size = 15
    x = torch.zeros(5, 3, size, size)
    for sample, (i, j) in enumerate([(0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1), (7, 6)]):
        x[sample, :, i, j] = 1
    weight = torch.arange(1.0, 3 * k * k + 1).view(3, 1, k, k)
    operator = OPERATORS["dwconv"]
    y = operator.serve(kernel, x=x, weight=weight, dilation=dilation)
    assert torch.equal(y, operator.reference(x=x, weight=weight, dilation=dilation))
