"""Partial sums, the bottleneck's pointwise kernels, and the plan that leaves the products to PyTorch."""

import pytest
import torch

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.cuda.reduce import sum_partials
from convnext_kernels.backends.cuda.shared import KERNELS
from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu.layout import output_rows
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters
from tests.backends.cuda import executed
from tests.operators import OPERATORS, expected, expected_gradients
from tests.reference import ACTIVATIONS
from tests.shapes import DTYPES, Case
from tests.tolerance import assert_as_good_as_eager, generator

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host"),
]

CASES = {
    "drop": Case("a sample dropped, channels in more than one tile", n=2, c=72, h=5, w=7, ratio=2, drop=True),
    "v2": Case("tails everywhere", n=2, c=13, h=6, w=7, variant="v2"),
    "variant": Case("SimpleNorm and Hardswish", n=2, c=13, h=5, w=7, norm="simple", activation="hardswish"),
    "plain": Case("no gamma, no bias, samples as one", n=3, c=16, h=5, w=7, variant="plain", bias=False),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYOUT_IDS = ["nchw", "nhwc"]


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
    KERNELS.activate(u.detach(), h, activation)
    KERNELS.activate_backward(du, u.detach(), du, activation)
    assert_as_good_as_eager(h, eager.detach(), reference.detach(), scale=1.0)
    assert_as_good_as_eager(du, u.grad, wide.grad, what="gradient", scale=1.0)


def _image(shape, dtype, layout, key):
    return torch.randn(shape, generator=generator(key)).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("channels", [13, 72])
@pytest.mark.parametrize("out_layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("z_dtype", "dtype"), [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_output_and_scaled_gradient(z_dtype, dtype, layout, out_layout, channels, host):
    """Every pair of dtypes and layouts against the formula, on a grid that loops."""
    host(last_first=True, grid_limit=2)
    n, height, width = 2, 5, 7
    shape = (n, channels, height, width)
    residual, like = _image(shape, dtype, layout, "residual"), _image(shape, dtype, out_layout, "like")
    z = torch.randn(n * height * width, channels, generator=generator("z")).to(z_dtype)
    bias, gamma = torch.randn(2, channels, generator=generator("parameters"))
    s = torch.tensor([0.0, 1.25])
    out, written = output_rows(like)
    KERNELS.output(z, bias, gamma, s, residual, written)
    assert out.stride() == like.stride()
    expect = residual.float() + s.view(n, 1, 1, 1) * mlp_cublas.as_image((z.float() + bias) * gamma, like)
    torch.testing.assert_close(out, expect.to(dtype))
    KERNELS.output(z, None, None, None, None, written)
    torch.testing.assert_close(out, mlp_cublas.as_image(z, like).to(dtype), rtol=0, atol=0)

    d, dz = torch.empty(2, *z.shape, dtype=z_dtype)
    KERNELS.scaled_gradient(like, gamma, s, d, dz)
    scaled = like.float() * s.view(n, 1, 1, 1)
    assert torch.equal(d, mlp_cublas.rows_of(scaled).to(z_dtype))
    torch.testing.assert_close(dz, (mlp_cublas.rows_of(scaled) * gamma).to(z_dtype))
    KERNELS.scaled_gradient(like, None, None, d, d)
    assert torch.equal(d, mlp_cublas.rows_of(like).to(z_dtype))


def check(case, dtype, layout, keep):
    """The bottleneck, forward and gradients, with matmuls by cuBLAS; u kept or computed again."""
    arguments = OPERATORS["mlp"].arguments(case, dtype)
    x, residual = (arguments[name].contiguous(memory_format=layout) for name in ("x", "residual"))
    p = MlpParameters(*(arguments.get(name) for name in MlpParameters._fields))
    call = MlpCall(x, residual, p, arguments.get("drop_scale"), 1e-6, 1e-6, case.norm, case.activation, dtype)
    hidden = None
    if keep:
        hidden = torch.empty((case.n, p.pwconv1_weight.shape[0], case.h, case.w), dtype=dtype)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
    y = mlp_cublas.forward(KERNELS, call, hidden)
    assert y.stride() == x.stride()
    assert_as_good_as_eager(y, *expected("mlp", case, dtype))
    dy, eager, reference = expected_gradients("mlp", case, dtype)
    dy = dy.contiguous(memory_format=layout)
    names = ("x", "norm_weight", "norm_bias")[: 2 if p.norm_bias is None else 3]
    norm, named = mlp_cublas.backward(KERNELS, dy, call, [True, True, p.norm_bias is not None], hidden)
    for name, gradient in (dict(zip(names, norm, strict=True)) | named).items():
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cublas_plan(case, dtype, layout, host):
    for last_first in (False, True):
        host(last_first=last_first, grid_limit=3)
        check(CASES[case], dtype, layout, keep=last_first)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(
    ("arch", "case", "dtype"),
    [
        (80, "drop", torch.bfloat16),
        (90, "drop", torch.float32),
        (90, "v2", torch.float16),
        (90, "plain", torch.bfloat16),
        (90, "variant", torch.float32),
    ],
)
def test_cublas_plan_executed(arch, case, dtype, layout):
    if reason := executed.missing():
        pytest.skip(reason)
    with executed.executed(arch):
        check(CASES[case], dtype, layout, keep=case == "drop")
