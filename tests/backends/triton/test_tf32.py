"""The bottleneck in fp32 with TF32 allowed: every plan and tile of ours, in the interpreter and as PTX.

TF32 has the mantissa of fp16: eager in fp16, which rounds the same factors, is the measure, on inputs that fp16 has.
"""

import pytest
import torch

from convnext_kernels import tuning
from tests.backends.triton import forcing
from tests.operators import check
from tests.shapes import Case, chosen

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton.plans import mlp_gradient_plan, mlp_plan

NARROW = Case("tails everywhere, whole rows in a program", n=2, c=40, h=5, w=7, drop=True)
WIDE = Case("a row in several programs, several tiles of the hidden", n=1, c=272, h=3, w=5, ratio=1)
V2 = Case("GRN: tiles within a sample", n=2, c=40, h=5, w=7, variant="v2")
HOPPER = tuning.for_arch(90)


def problem(case, tf32=True, keeps_hidden=False):
    pixels, hidden, grn = case.h * case.w, case.c * case.ratio, case.variant == "v2"
    return mlp_plan.Problem(case.n, pixels, case.c, hidden, grn, "float32", "float32", keeps_hidden, tf32)


def library(candidate):
    return candidate.name in ("cublas", "library")


def ours(candidates, case):
    return [c.name for c in candidates(problem(case), HOPPER) if not library(c)]


# What is forced: fused tiles, then the products, whose nth tiles go together; kept hidden in turn
ROWS = [(NARROW, {"mlp_forward": name}) for name in ours(mlp_plan.forward_candidates, NARROW)[:-1]]
PRODUCTS = {
    "mlp_expand": mlp_plan.expand_candidates,
    "mlp_project": mlp_plan.project_candidates,
    **mlp_gradient_plan.GRADIENTS,
}
for turn in range(max(len(ours(candidates, WIDE)) for candidates in PRODUCTS.values())):
    tiles = {kernel: ours(candidates, WIDE) for kernel, candidates in PRODUCTS.items()}
    ROWS.append((WIDE, {"mlp_forward": "gemm"} | {k: names[turn % len(names)] for k, names in tiles.items()}))
ROWS += [(V2, {"mlp_forward": name}) for name in (ours(mlp_plan.forward_candidates, V2)[0], "gemm")]


@pytest.fixture(autouse=True)
def allowed():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@chosen(lambda index, turn: turn or index in (0, 2, len(ROWS) - 2))  # tiles are the emulator's
@pytest.mark.parametrize("index", range(len(ROWS)))
def test_parity(index, turn):
    """As PTX on three generations of tensor cores in turn."""
    case, wanted = ROWS[index]
    wanted = wanted | {"mlp_backward": "gemm"}
    options = {"runs": 1, "compute": torch.float32, "memory": ("min", "balanced")[index % 2]}
    with (
        turn(index, (100, 80, 90)),
        forcing(lambda candidates: next((c for c in candidates if not library(c)), None), **wanted) as taken,
    ):
        check("mlp", case, torch.float16, torch.channels_last, "triton", **options)
    assert taken == set(wanted)


def test_only_where_it_is_allowed():
    """IEEE fp32 is the library's, and all fp32 on AMD's GPUs."""
    for candidates, plans in (
        (mlp_plan.forward_candidates, {"cublas", "gemm", *ours(mlp_plan.forward_candidates, NARROW)}),
        (mlp_gradient_plan.backward_candidates, {"cublas", "gemm"}),
    ):
        assert {c.name for c in candidates(problem(NARROW), HOPPER)} == plans
        assert {c.name for c in candidates(problem(NARROW, tf32=False), HOPPER)} == {"cublas"}
        assert {c.name for c in candidates(problem(NARROW), tuning.for_device("AMD Instinct", "gfx942"))} == {"cublas"}
