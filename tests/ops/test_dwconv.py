"""What is special about the depthwise convolution: its borders."""

import pytest
import torch

from tests.operators import OPERATORS, gradients
from tests.shapes import TRITON, chosen


@chosen(lambda k, dilation, kernel: (k, dilation) in ((3, 1), (5, 3), (7, 2)) or kernel != TRITON)
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


@chosen(lambda dtype, backend: dtype == torch.bfloat16 or backend != TRITON)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "dilation"), [(7, 2), (3, 3), (7, 1)])
def test_gradients_of_wide_channels_last_images(k, dilation, dtype, backend):
    """More than 28 columns: there oneDNN's 16-bit weight gradient is garbage for dilations above 1 (torch 2.14.1)."""
    x, dy = (torch.randn(1, 17, 8, 31).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(17, 1, k, k).to(dtype).to(memory_format=torch.channels_last)
    operator = OPERATORS["dwconv"]
    found = gradients(lambda **a: operator.serve(backend, dilation=dilation, **a), {"x": x, "weight": weight}, dy)
    wide = {"x": x.double().contiguous(), "weight": weight.double().clone(memory_format=torch.contiguous_format)}
    expected = gradients(lambda **a: operator.reference(dilation=dilation, **a), wide, dy.double().contiguous())
    for name, truth in expected.items():
        error = (found[name].double() - truth).abs().max() / truth.abs().max()
        assert error <= 8 * torch.finfo(dtype).eps, name  # garbage is off by more than its own size
