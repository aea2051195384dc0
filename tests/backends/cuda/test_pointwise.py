"""Partial sums and the bottleneck's pointwise kernels."""

import pytest
import torch

from convnext_kernels.backends.cuda import native, shared
from convnext_kernels.backends.cuda.reduce import sum_partials
from tests.reference import ACTIVATIONS
from tests.shapes import DTYPES
from tests.tolerance import assert_as_good_as_eager, generator

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host"),
]


@pytest.mark.parametrize("parts", [1, 2, 3, 31, 300, 2500])
@pytest.mark.parametrize("shape", [(1,), (2, 13), (64,), (3, 1000)], ids=str)
def test_partial_sums(parts, shape, host):
    partials = torch.randn((parts, *shape), generator=generator("partials", parts, shape))
    reference = partials.double().sum(dim=0)
    first = sum_partials(partials, torch.float32)
    for last_first, limit in ((False, 2), (True, 2**31 - 1)):
        host(last_first=last_first, grid_limit=limit)
        for dtype in DTYPES:
            result = sum_partials(partials, dtype)
            assert result.shape == shape
            assert torch.equal(result, first.to(dtype))
    assert (first - reference).abs().max() <= 1e-6 * partials.abs().sum(dim=0).max()


@pytest.mark.parametrize("count", [1, 7, 8, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, count, host):
    """Values, and gradients in place."""
    host(last_first=True, grid_limit=2)
    u = (torch.randn(count, generator=generator("u")) * 3).to(dtype).requires_grad_()
    dh = torch.randn(count, generator=generator("dh")).to(dtype)
    wide = u.detach().double().requires_grad_()
    eager, reference = (ACTIVATIONS[activation](t) for t in (u, wide))
    eager.backward(dh)
    reference.backward(dh.double())
    h, du = torch.empty_like(dh), dh.clone()
    shared.activate(u.detach(), h, activation)
    shared.activate_backward(du, u.detach(), du, activation)
    assert_as_good_as_eager(h, eager.detach(), reference.detach(), scale=1.0)
    assert_as_good_as_eager(du, u.grad, wide.grad, what="gradient", scale=1.0)
