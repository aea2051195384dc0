"""The bottleneck in fp32 with TF32 allowed: every plan and tile of ours, in the interpreter and as PTX.

TF32 has the mantissa of fp16: eager in fp16, which rounds the same factors, is the measure, on inputs that fp16 has.
"""

import pytest
import torch

from convnext_kernels import tuning
from tests.backends.triton import interpreted
from tests.operators import OPERATORS, expected, expected_gradients, gradients
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton.plans import mlp_gradient_plan, mlp_plan

NARROW = Case("tails everywhere, whole rows in a program", n=2, c=40, h=5, w=7, drop=True)
WIDE = Case("a row in several programs, several tiles of the hidden", n=1, c=272, h=3, w=5, ratio=1)
V2 = Case("GRN: tiles within a sample", n=2, c=40, h=5, w=7, variant="v2")
HOPPER = tuning.for_arch(90)


def problem(case, tf32=True, keeps_hidden=False):
    pixels, hidden, grn = case.h * case.w, case.c * case.ratio, case.variant == "v2"
    return mlp_plan.Problem(case.n, pixels, case.c, hidden, grn, "float32", "float32", keeps_hidden, tf32)


def ours(candidates, case):
    return [c.name for c in candidates(problem(case), HOPPER) if c.name not in ("cublas", "library")]


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


def check(case, wanted, memory):
    arguments = OPERATORS["mlp"].arguments(case, torch.float16)
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    dy, eager, reference = expected_gradients("mlp", case, torch.float16)
    wanted, taken = wanted | {"mlp_backward": "gemm"}, set()

    def choice(kernel, problem, candidates, gpu):
        found = next((c for c in candidates if c.name == wanted.get(kernel)), None)
        taken.update([kernel] if found else [])
        return found or next((c for c in candidates if c.name not in ("cublas", "library")), None)

    def call(**a):
        return OPERATORS["mlp"].serve("triton", **a, memory=memory)

    with tuning.forced(choice):
        result, truth = expected("mlp", case, torch.float16)
        assert_as_good_as_eager(call(**arguments), result.float(), truth, dtype=torch.float16)
        for name, gradient in gradients(call, arguments, dy.float()).items():
            half = eager[name].float()
            assert_as_good_as_eager(gradient, half, reference[name], what=name, dtype=torch.float16)
    assert taken == set(wanted)


@interpreted
@pytest.mark.parametrize("index", [0, 2, len(ROWS) - 2])  # tiles are the emulator's
def test_parity(index):
    check(*ROWS[index], ("min", "balanced")[index % 2])


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_executed(index, emulate):
    """Each once: on three generations of tensor cores in turn."""
    with emulate((100, 80, 90)[index % 3]):
        check(*ROWS[index], ("min", "balanced")[index % 2])


def test_only_where_it_is_allowed():
    """IEEE fp32 is the library's, and all fp32 on AMD's GPUs."""
    for candidates, plans in (
        (mlp_plan.forward_candidates, {"cublas", "gemm", *ours(mlp_plan.forward_candidates, NARROW)}),
        (mlp_gradient_plan.backward_candidates, {"cublas", "gemm"}),
    ):
        assert {c.name for c in candidates(problem(NARROW), HOPPER)} == plans
        assert {c.name for c in candidates(problem(NARROW, tf32=False), HOPPER)} == {"cublas"}
        assert {c.name for c in candidates(problem(NARROW), tuning.for_device("AMD Instinct", "gfx942"))} == {"cublas"}
