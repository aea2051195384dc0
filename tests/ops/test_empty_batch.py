"""A batch of no samples: a result of the right shape, dtype and strides, and zero gradients."""

import pytest
import torch

from tests.operators import OPERATORS, differentiable, laid_out, with_gradients
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
    arguments["x"] = laid_out(arguments["x"], memory_format)
    arguments = with_gradients(arguments)
    y = OPERATORS[op].serve(kernel, **arguments)
    assert y.shape == {"downsample": (0, 19, 3, 2), "dwconv3d": (0, 16, 3, 7, 5)}.get(op, (0, 16, 7, 5))
    assert y.dtype == dtype
    y.sum().backward()
    for name in differentiable(arguments):
        grad = arguments[name].grad
        assert grad.shape == arguments[name].shape
        assert not grad.any(), f"{name}: no sample, but a gradient"
