"""LayerNorm, GRN, downsampling, sums, activations beyond what the general suites run: thread order, grids, PTX."""

import pytest
import torch

from convnext_kernels.backends.cuda import layernorm, native, shared
from convnext_kernels.backends.cuda.reduce import sum_partials
from convnext_kernels.calls import NormCall
from tests.backends.cuda import executed
from tests.operators import check
from tests.reference import ACTIVATIONS
from tests.shapes import DTYPES, Case
from tests.tolerance import assert_as_good_as_eager, generator

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host"),
]

CASES = {
    "odd": Case("channels that no 16-byte load divides, a rest in H and W", n=2, c=13, h=7, w=5),
    "vectors": Case("three slots of a team, every one full", n=2, c=96, h=7, w=6),
    "tail": Case("teams with idle lanes, patches of 3", n=3, c=40, h=8, w=7, patch=3),
    "tiles": Case("more pixels than a tile of GRN's sums, more samples than blocks", n=3, c=24, h=12, w=11),
    "wide": Case("a pixel in several warps, channels in several spans", n=1, c=1000, h=5, w=7),
    # teams of all the threads of a block, and more channels than one holds
    **{f"C{c}": Case("many channels", n=2, c=c, h=3, w=1) for c in (2048, 4100, 8200)},
    **{f"{norm}-C{c}": Case(norm, c=c, h=3, norm=norm) for norm in ("rms", "simple") for c in (2, 13, 96, 1000, 3100)},
}
OPS = ("layernorm", "grn", "downsample")
NORMS = ("layernorm", "grn")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYOUT_IDS = ["nchw", "nhwc"]
# The dtype changes loads, stores and conversions, all of which "odd" and "vectors" reach.
HOST_ROWS = [
    *((op, case, dtype) for op in OPS for case in ("odd", "vectors") for dtype in DTYPES),
    # Also in fp32, whose tolerance shows a sum that took one warp's part from the next sample.
    *((op, case, dtype) for op in OPS for case in ("tail", "tiles") for dtype in (torch.bfloat16, torch.float32)),
    *((op, "wide", torch.bfloat16) for op in NORMS),
    *(("layernorm", case, dtype) for case in CASES if "C" in case for dtype in (torch.bfloat16, torch.float32)),
]
HOST_ROWS = [row for row in HOST_ROWS if row[1:] not in (("rms-C3100", torch.float32), ("simple-C3100", torch.float32))]
PTX_ROWS = [
    (90, "layernorm", "odd", torch.float16),
    (90, "layernorm", "vectors", torch.float32),
    (90, "layernorm", "wide", torch.bfloat16),
    (90, "grn", "odd", torch.float16),
    (90, "grn", "tiles", torch.bfloat16),
    (90, "downsample", "tail", torch.bfloat16),
    (80, "layernorm", "vectors", torch.bfloat16),
    (80, "grn", "odd", torch.bfloat16),
    *((arch, "layernorm", "odd", torch.bfloat16) for arch in (75, 86, 100, 120)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("op", "case", "dtype"), HOST_ROWS)
def test_either_thread_order_and_looping_grids(op, case, dtype, layout, host):
    scale = 0.0 if CASES[case].norm == "layer" else 1.0
    for last_first, limit in ((False, 2), (True, 5)):
        host(last_first=last_first, grid_limit=limit)
        check(op, CASES[case], dtype, layout, "cuda", scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("arch", "op", "case", "dtype"), PTX_ROWS)
def test_executed(arch, op, case, dtype, layout):
    with executed.executed(arch):
        check(op, CASES[case], dtype, layout, "cuda", runs=1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_pixels_that_are_not_there_cost_no_gradient(layout):
    """eps 0: pixels past the end of a block would have an infinite rstd, and 0 * inf would reach the sums."""
    x, dy = torch.randn(2, 1, 24, 5, 7).contiguous().unbind()
    x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    for gradient in layernorm.backward(dy, NormCall(x, torch.ones(24), torch.zeros(24), 0.0), [True] * 3):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("parts", [1, 2, 3, 31, 64, 300, 2500])
@pytest.mark.parametrize("shape", [(1,), (2, 13), (64,), (3, 1000)], ids=str)
def test_partial_sums(parts, shape, host):
    """Threads share the parts, and a block takes several groups of columns."""
    partials = torch.randn((parts, *shape), generator=generator("partials", parts, shape))
    reference = partials.double().sum(dim=0)
    first = sum_partials(partials, torch.float32)
    for last_first, limit in ((False, 1), (False, 2), (True, 1), (True, 2**31 - 1)):
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
