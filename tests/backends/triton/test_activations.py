"""The activations of Triton's kernels against PyTorch's in fp64, in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
import triton.language as tl  # noqa: E402

from convnext_kernels.backends.triton.kernels import activations as shipped  # noqa: E402
from tests.backends.triton import interpreted  # noqa: E402
from tests.reference import ACTIVATIONS  # noqa: E402

pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy interprets, and warns of inf - inf and overflow
]


@triton.jit
def evaluate_kernel(x_ptr, alone_ptr, value_ptr, derivative_ptr, count, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    value, derivative = shipped.activate_and_derivative(x, ACTIVATION)
    tl.store(alone_ptr + i, shipped.activate(x, ACTIVATION), mask=i < count)
    tl.store(value_ptr + i, value, mask=i < count)
    tl.store(derivative_ptr + i, derivative, mask=i < count)


def evaluate(x, activation="gelu"):
    """Return the activation of x and its derivative."""
    alone, value, derivative = torch.empty(3, *x.shape)
    grid = (triton.cdiv(x.numel(), 65536),)
    evaluate_kernel[grid](
        x, alone, value, derivative, x.numel(), BLOCK=65536, ACTIVATION=activation, enable_fp_fusion=True
    )
    assert torch.equal(alone.nan_to_num(), value.nan_to_num())
    return alone, derivative


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_pytorch(activation):
    x = torch.cat([torch.linspace(-8, 8, 400_001), torch.linspace(-0.01, 0.01, 20_001)])
    value, derivative = evaluate(x, activation)
    wide = x.double().requires_grad_()
    exact = ACTIVATIONS[activation](wide)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    assert (value - exact).abs().max() < 1e-6
    assert (derivative - slope).abs().max() < 2e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nonfinite(activation):
    value, derivative = evaluate(torch.tensor([torch.nan, torch.inf, -torch.inf]), activation)
    assert value[0].isnan()
    if activation == "gelu":
        assert derivative[0].isnan()
        assert value[1] == torch.inf
        assert -1e-8 < value[2] <= 0
