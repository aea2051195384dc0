"""LayerNorm, GRN, downsampling beyond what the general suites run: thread order, looping grids, PTX."""

import pytest
import torch

from convnext_kernels.backends.cuda import layernorm, native, reduce
from convnext_kernels.calls import NormCall
from tests.backends.cuda import executed
from tests.operators import check
from tests.shapes import DTYPES, Case
from tests.tolerance import generator

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
]
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
    for last_first, limit in ((False, 2), (True, 5)):
        host(last_first=last_first, grid_limit=limit)
        check(op, CASES[case], dtype, layout, "cuda")


def test_sums_of_many_parts_in_either_thread_order(host):
    """Threads share the parts, and a block takes several groups of columns."""
    partials = torch.randn(64, 1500, generator=generator("partials"))
    for last_first in (False, True):
        host(last_first=last_first, grid_limit=1)
        total = reduce.sum_partials(partials, torch.float32)
        torch.testing.assert_close(total.double(), partials.double().sum(dim=0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("arch", "op", "case", "dtype"), PTX_ROWS)
def test_executed(arch, op, case, dtype, layout):
    with executed.executed(arch):
        check(op, CASES[case], dtype, layout, "cuda", runs=1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("channels", [2048, 4100, 8200], ids="C{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_channels(dtype, channels, layout, host):
    """Teams of all the threads of a block, and more channels than one holds."""
    for last_first in (False, True):
        host(last_first=last_first, grid_limit=2)
        check("layernorm", Case("many channels", n=2, c=channels, h=3, w=1), dtype, layout, "cuda")


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_pixels_that_are_not_there_cost_no_gradient(layout):
    """eps 0: pixels past the end of a block would have an infinite rstd, and 0 * inf would reach the sums."""
    x, dy = torch.randn(2, 1, 24, 5, 7).contiguous().unbind()
    x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    for gradient in layernorm.backward(dy, NormCall(x, torch.ones(24), torch.zeros(24), 0.0), [True] * 3):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("channels", [2, 13, 96, 1000, 3100], ids="C{}".format)
@pytest.mark.parametrize("norm", ["rms", "simple"])
def test_rms_and_simple(norm, channels, layout, host):
    for last_first, limit in ((False, 2**31 - 1), (True, 2)):
        host(last_first=last_first, grid_limit=limit)
        for dtype in (torch.float32, torch.bfloat16)[channels == 3100 :]:  # which is refused in fp32
            check("layernorm", Case(norm, c=channels, h=3, norm=norm), dtype, layout, "cuda", runs=1, scale=1.0)


@pytest.mark.parametrize("shape", [(2**33, 8, 1, 1), (2**17, 96, 256, 256), (2, 4, 2**16, 2**16)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_grids_of_2_to_the_33_pixels(shape, channels_last, recorded):
    """N * H * W up to 2^33: launches stay within the limits of a grid; nothing is run."""
    n, c, h, w = shape
    bf16 = native.DTYPE_CODES[torch.bfloat16]
    image = (1 << 40, bf16, c * h * w, *((c, 1) if channels_last else (1, h * w)))
    vector, launches, extension = (1 << 41, bf16), recorded(), native.extension()
    sizes, patches = (n, h * w, c), (2, h, w)
    extension.layernorm((0, 0), image, image, vector, vector, 1e-6, *sizes, *patches, 0)
    parts = extension.layernorm_parts((0, 0), n * h * w)
    assert parts <= 2 * 132
    extension.layernorm_backward((0, 0), image, image, image, vector, 1 << 42, parts, 1e-6, *sizes, *patches, 0)
    extension.grn_sums((0, 0), image, image, *[1 << 42] * 3, *sizes)
    extension.grn_apply((0, 0), image, image, image, 1 << 42, 1 << 42, None, *sizes)
    assert len(launches) == 4
    assert all(1 <= launch.grid <= 2**31 - 1 and launch.shared_bytes <= 48 << 10 for launch in launches)
