"""A batch of no samples: a result of the right shape, dtype and strides, and zero gradients."""

import pytest
import torch

from tests.operators import OPERATORS, differentiable, with_gradients
from tests.shapes import BOTTLENECK, DTYPES, KERNELS, Case, chosen

pytestmark = pytest.mark.usefixtures("poisoned_memory")


FORMATS = (torch.contiguous_format, torch.channels_last)


def everyday(op, dtype, variant, memory_format, kernel):
    """The variants where there are any; memory formats alternate from dtype to dtype and from kernel to kernel."""
    turn = DTYPES.index(dtype) + KERNELS.index(kernel) + (variant == "v2")
    return (variant == "v1" or op in BOTTLENECK) and memory_format == FORMATS[turn % 2]


@chosen(everyday)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_empty_batch(op, dtype, variant, memory_format, kernel):
    arguments = OPERATORS[op].arguments(Case("nothing", n=0, variant=variant), dtype)
    arguments["x"] = arguments["x"].contiguous(memory_format=memory_format)
    arguments = with_gradients(arguments)
    y = OPERATORS[op].serve(kernel, **arguments)
    height, width, channels = (3, 2, 19) if op == "downsample" else (7, 5, 16)
    assert y.shape == (0, channels, height, width)
    assert y.dtype == dtype
    y.sum().backward()
    for name in differentiable(arguments):
        grad = arguments[name].grad
        assert grad.shape == arguments[name].shape
        assert not grad.any(), f"{name}: no sample, but a gradient"
