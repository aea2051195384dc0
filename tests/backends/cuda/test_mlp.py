"""The fused bottleneck beyond what the general suites run: thread order, looping grids, PTX, every width, its plan."""

import pytest
import torch

from convnext_kernels import tuning
from convnext_kernels.backends.cuda import mlp, mlp_plan, native
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters
from tests.backends.cuda import executed
from tests.operators import OPERATORS, check_gradients, expected
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NHWC, NCHW = torch.channels_last, torch.contiguous_format
CASES = {
    "1": Case("one channel", n=3, c=1, h=3, w=5),
    "8": Case("hidden not a multiple of a chunk", c=8, h=5, w=7, ratio=3),
    "40": Case("tails everywhere, several tiles, drop path", n=3, c=40, h=9, w=7, drop=True),
    "40 v2": Case("the same with GRN: tiles within a sample", c=40, h=9, w=7, variant="v2"),
    "40 norm": Case("SimpleNorm and Hardswish", n=1, c=40, h=5, w=7, norm="simple", activation="hardswish"),
    "96": Case("whole pieces", n=1, c=96, h=7, w=6),
    "100": Case("rows that no 16-byte load divides", n=1, c=100, h=5, w=7, ratio=1, drop=True),
    "128": Case("the most sums in registers", n=1, c=128, h=7, w=5, ratio=1),
    "130 v2": Case("a tail of two", n=2, c=130, h=3, w=5, ratio=1, variant="v2"),
    "192": Case("warps of 16 pixels", n=1, c=192, h=5, w=5, ratio=1, variant="plain"),
    "256": Case("the widest, no biases", n=1, c=256, h=3, w=9, ratio=1, bias=False),
    "136 x 3": Case("hidden of no whole chunks, 16-byte loads all the same", n=1, c=24, h=4, w=10, ratio=9),
}
EVERY = [(case, dtype) for case in CASES if case != "40 norm" for dtype in (BF16, FP32)] + [
    ("40", FP16),
    ("130 v2", FP16),
    ("256", FP16),
]


@pytest.fixture
def plan_of():
    """``with plan_of("fused", 64):``: that plan, with tiles of so many pixels where it is given."""

    def force(plan, tile=None):
        def choice(kernel, problem, candidates, gpu):
            of_plan = [c for c in candidates if c.config["plan"] == plan and tile in (None, c.config.get("tile"))]
            return of_plan[-1]

        return tuning.forced(choice)

    return force


def prepared(op, case, dtype, layout):
    arguments = OPERATORS[op].arguments(CASES[case], dtype)
    arguments["x"] = arguments["x"].contiguous(memory_format=layout)
    if "residual" in arguments:
        arguments["residual"] = arguments["residual"].contiguous(memory_format=layout)
    return arguments


def check(op, case, dtype, layout, memory="balanced"):
    """The output against fp64, twice."""
    arguments = prepared(op, case, dtype, layout)
    y, again = (OPERATORS[op].call(**arguments, backend="cuda", memory=memory) for _ in range(2))
    assert_as_good_as_eager(y, *expected(op, CASES[case], dtype))
    assert torch.equal(y, again), "differs from run to run"


@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_either_thread_order_and_looping_grids(case, dtype, layout, host, plan_of):
    tile = 32 if dtype == FP32 else None  # two warps; the smallest of fp32 has one, which waits for no other
    for last_first in (False, True):
        host(last_first=last_first, grid_limit=2)
        with plan_of("fused", tile):
            check("mlp", case, dtype, layout)


@pytest.mark.parametrize("tile", [64, 128, 256])
def test_every_tile(tile, plan_of):
    with plan_of("fused", tile):
        check("mlp", "40", BF16, NHWC)
        check("mlp", "40 v2", BF16, NCHW)


@pytest.mark.parametrize("case", ["40", "40 v2", "100"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("plan", ["fused", "cublas"])
def test_both_plans_keep_the_hidden(plan, dtype, case, plan_of):
    arguments = prepared("block", case, dtype, NHWC)
    dy = torch.randn_like(arguments["x"])
    for memory in ("balanced", "min"):
        with plan_of(plan):
            check("block", case, dtype, NHWC, memory)
            check_gradients("block", arguments, dy, "cuda", memory=memory)


@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("case", ["40 v2", "100"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_fp32_pixels_and_16_bit_products(dtype, case, layout, plan_of):
    """What autocast asks for."""
    arguments = prepared("mlp", case, FP32, layout)
    eager, reference = expected("mlp", CASES[case], FP32)
    with plan_of("fused"), torch.autocast("cpu", dtype):
        y = OPERATORS["mlp"].call(**arguments, backend="cuda")
        eager = OPERATORS["mlp"].call(**arguments, backend="eager")
    assert_as_good_as_eager(y, eager, reference, dtype=dtype)


EXECUTED = [
    ("40", BF16, NHWC),
    ("40", FP16, NCHW),
    ("40 v2", BF16, NHWC),
    ("40 v2", FP32, NCHW),
    ("100", BF16, NHWC),
    ("100", FP32, NHWC),
    ("128", FP16, NHWC),
    ("130 v2", BF16, NCHW),
    ("256", BF16, NHWC),
]
# No cp.async, products of half the depth, one buffer for the widest weights
TURING = [("40", FP16, NHWC), ("40 v2", FP16, NHWC), ("40", FP32, NHWC), ("256", FP16, NHWC)]


@pytest.mark.parametrize(
    ("arch", "case", "dtype", "layout"),
    [
        *((arch, *row) for arch in (80, 90) for row in EXECUTED),
        *((75, *row) for row in TURING),
        *((arch, "40 v2", BF16, NHWC) for arch in (100, 120)),
    ],
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else None,
)
def test_executed(arch, case, dtype, layout, plan_of):
    with executed.executed(arch) as run, plan_of("fused"):
        check("mlp", case, dtype, layout)
    assert not any(launch.warn for launch in run.launches)


@pytest.mark.parametrize(
    ("arch", "case", "dtype", "layout"),
    [(80, "40", BF16, NHWC), (90, "40", FP32, NCHW), (90, "40 v2", FP16, NHWC), (90, "40 norm", FP32, NHWC)],
)
def test_cublas_plan_executed(arch, case, dtype, layout, plan_of):
    """Its pointwise kernels, forward and gradients."""
    arguments = prepared("mlp", case, dtype, layout)
    with executed.executed(arch), plan_of("cublas"):
        check("mlp", case, dtype, layout)
        check_gradients("mlp", arguments, torch.randn_like(arguments["x"]), "cuda")


@pytest.mark.parametrize("c", [96, 192])
def test_what_the_executed_kernel_moves(c, plan_of):
    """x, residual and output once, both weights once; the least products; no bank conflict."""
    arguments = OPERATORS["mlp"].arguments(Case("whole tiles", n=1, c=c, h=16, w=16, ratio=1), BF16)
    for name in ("x", "residual"):
        arguments[name] = arguments[name].contiguous(memory_format=NHWC)
    with executed.executed(90) as run, plan_of("fused", 128):
        OPERATORS["mlp"].call(**arguments, backend="cuda", memory="min")
    (launch,) = run.launches
    s = launch.stats
    weights, parameters = 2 * c * c * 2, 6 * c * 2
    assert s["gld_unique_bytes"] + s["gst_unique_bytes"] <= 256 * 3 * c * 2 + weights + parameters
    assert s["mma_flops"] == 256 * 2 * 2 * c * c
    assert s["sld_wavefronts"] * 128 == s["sld_bytes"]
    assert s["sst_wavefronts"] * 128 <= 1.1 * s["sst_bytes"]
    assert s["sst_async_wavefronts"] * 128 == s["sst_async_bytes"]


def problem(c=96, dtype="bfloat16", n=8, size=56, **other):
    defaults = {"grn": False, "dtype": dtype, "compute_dtype": dtype, "keeps_hidden": False, "tf32": False}
    return mlp_plan.Problem(n, size * size, c, 4 * c, **{**defaults, **other})


def plans(p, gpu):
    return {candidate.config["plan"] for candidate in mlp_plan.forward_candidates(p, gpu)}


def test_what_the_fused_kernels_do_not_serve():
    h100, t4 = tuning.for_arch(90), tuning.for_arch(75)
    assert plans(problem(256), h100) == {"fused", "cublas"}
    assert plans(problem(257), h100) == {"cublas"}
    assert plans(problem(dtype="float32"), h100) == {"fused", "cublas"}
    assert plans(problem(dtype="float32", tf32=True), h100) == {"cublas"}
    assert plans(problem(dtype="float16"), t4) == {"fused", "cublas"}
    assert plans(problem(dtype="bfloat16"), t4) == {"cublas"}


@pytest.mark.parametrize("arch", sorted(executed.DEVICES))
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_candidate_fits(dtype, arch, recorded, plan_of):
    """Threads and shared memory of every width and tile are within the GPU's limits."""
    multiprocessors, shared_bytes = executed.DEVICES[arch]
    gpu = tuning.for_arch(arch)
    for c in (1, 33, 65, 97, 129, 193, 256):
        for layout in (NHWC, NCHW):
            x = torch.empty(1, c, 16, 32, dtype=dtype).contiguous(memory_format=layout)
            w1, w2, vector = torch.empty(2 * c, c, dtype=dtype), torch.empty(c, 2 * c, dtype=dtype), x.new_empty(c)
            p = MlpParameters(vector, vector, w1, None, w2, None, None, None, None)
            name = str(dtype).removeprefix("torch.")
            asked = mlp_plan.Problem(1, 512, c, 2 * c, False, name, name, False, False)
            tiles = [k.config["tile"] for k in mlp_plan.forward_candidates(asked, gpu) if k.config["plan"] == "fused"]
            assert tiles or (arch == 75 and dtype == BF16)
            launches = recorded(arch=arch, multiprocessors=multiprocessors, shared_bytes=shared_bytes)
            for tile in tiles:
                with plan_of("fused", tile):
                    mlp.forward(MlpCall(x, x, p, None, 1e-6, 1e-6, "layer", "gelu", dtype))
            assert len(launches) == len(tiles)
            assert all(0 < launch.shared_bytes <= shared_bytes and launch.threads <= 256 for launch in launches)
