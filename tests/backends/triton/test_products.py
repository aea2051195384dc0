"""The products of the bottleneck, one by one ours or the library's: every candidate, in the interpreter and as PTX."""

import dataclasses
import itertools

import pytest
import torch

from convnext_kernels import tuning
from tests.backends.triton import forcing
from tests.operators import OPERATORS, check, check_forward, expected
from tests.shapes import Case, chosen
from tests.tolerance import assert_as_good_as_eager

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton.plans import mlp_gradient_plan, mlp_plan

WIDE = {
    "v1": Case("tails in pixels, channels and hidden; several tiles of each", n=2, c=272, h=9, w=8, ratio=2, drop=True),
    "v2": Case("tiles within a sample", n=2, c=272, h=5, w=7, ratio=2, variant="v2"),
}
HOPPER = tuning.for_arch(90)


def problem(case, keeps_hidden=True):
    hidden = case.c * case.ratio
    return mlp_plan.Problem(
        case.n, case.h * case.w, case.c, hidden, case.variant == "v2", *["bfloat16"] * 2, keeps_hidden, False
    )


def names(candidates, case):
    return [candidate.name for candidate in candidates(problem(case), HOPPER)]


EXPAND = [(name, "64x64-k64-s2") for name in names(mlp_plan.expand_candidates, WIDE["v1"])]
PROJECT = [("fold-64x64-k64-s2", name) for name in names(mlp_plan.project_candidates, WIDE["v1"])]


def run(case, expand, project, memory):
    arguments = OPERATORS["mlp"].arguments(case, torch.bfloat16)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    with forcing(mlp_forward="gemm", mlp_expand=expand, mlp_project=project) as taken:
        y = OPERATORS["mlp"].serve("triton", **arguments, memory=memory)
    assert taken == {"mlp_forward", "mlp_expand", "mlp_project"}
    assert_as_good_as_eager(y, *expected("mlp", case, torch.bfloat16))


PRODUCTS = list(dict.fromkeys(EXPAND + PROJECT))


@pytest.fixture
def no_descriptors(request):
    """The emulator has none."""
    if request.node.callspec.params["turn"] and "-tma" in str(request.node.callspec.params):
        pytest.skip("loads through descriptors are not emulated")


# Candidates are the same kernels with other tiles: a sixth of them every day.
@chosen(lambda products, turn: turn or "library" in products or PRODUCTS.index(products) % 6 == 0)
@pytest.mark.parametrize("products", PRODUCTS, ids="-".join)
def test_every_candidate(products, turn, no_descriptors):
    index = PRODUCTS.index(products)
    with turn(index):
        run(WIDE["v1"], *products, ("min", "balanced")[index // 2 % 2])


@pytest.mark.parametrize(
    ("expand", "project"),
    [
        ("64x64-k32-s2", "64x64-k64-s2"),
        ("fold-128x128-k64-s2-g8", "128x128-k32-s4-g8"),
        ("fold-64x64-k64-s2",) * 2,
        ("fold-64x64-k64-s2", "64x64-k64-s4-tma"),
    ],
)
def test_with_grn(expand, project):
    run(WIDE["v2"], expand, project.removeprefix("fold-"), "min")


EVEN = Case("tiles of 128 channels without a tail", n=2, c=384, h=9, w=8, ratio=1)


@chosen(lambda name: name.endswith("-ws"))  # the kernel without warp specialisation is the same in the interpreter
@pytest.mark.parametrize("name", [name for name in names(mlp_plan.project_candidates, EVEN) if "s3-g8-tma" in name])
def test_loads_through_descriptors(name):
    run(EVEN, "64x64-k32-s2", name, "min")


def test_where_loads_go_through_descriptors():
    """From sm_90 on, of rows of 16 bytes."""
    for case, arch, count in ((EVEN, 80, 0), (EVEN, 90, 3), (EVEN, 100, 3), (EVEN, 120, 2), (WIDE["v1"], 90, 1)):
        candidates = mlp_plan.project_candidates(problem(case), tuning.for_arch(arch))
        assert len([c for c in candidates if "-tma" in c.name and "split" not in c.name]) == count
    assert not mlp_plan.described(problem(dataclasses.replace(EVEN, c=380)), HOPPER)


GRADIENTS = [
    (kernel, candidate.name)
    for kernel, candidates in mlp_gradient_plan.GRADIENTS.items()
    for candidate in candidates(problem(WIDE["v1"], False), HOPPER)
]


def run_gradients(case, forced, memory, dtype=torch.bfloat16, plan="gemm"):
    """`forced`: the candidate of each kernel that is not chosen as usual."""
    with forcing(mlp_forward="gemm", mlp_backward=plan, **forced) as taken:
        check("mlp", case, dtype, torch.channels_last, "triton", runs=1, memory=memory)
    assert {*forced, "mlp_backward"} <= taken


# One candidate of each kernel at a time: first the library's of all, which are the last candidates.
TOGETHER = [
    {kernel: name for kernel, name in zip(mlp_gradient_plan.GRADIENTS, found, strict=True) if name}
    for found in itertools.zip_longest(
        *([n for k, n in reversed(GRADIENTS) if k == kernel] for kernel in mlp_gradient_plan.GRADIENTS)
    )
]


@chosen(lambda index: index in (0, 2))
@pytest.mark.parametrize("index", range(len(TOGETHER)))
def test_every_candidate_of_the_gradients(index):
    case = dataclasses.replace(WIDE["v1"], w=4)
    run_gradients(case, TOGETHER[index], "balanced" if index % 4 == 2 else "min")


def test_the_fused_kernel_keeps_what_enters_the_activation():
    with forcing(mlp_forward="fused-m64-h64-w4", mlp_backward="gemm") as taken:
        check("mlp", NARROW["c40"], torch.bfloat16, torch.channels_last, "triton", runs=1, memory="balanced")
    assert {"mlp_forward", "mlp_backward"} <= taken


@pytest.mark.extended
def test_library_gradients_with_grn():
    run_gradients(WIDE["v2"], {k: n for k, n in TOGETHER[0].items() if k != "mlp_hidden_gradient"}, "min")


@pytest.mark.parametrize("gradient", [gradient for gradient in GRADIENTS if "-tma" not in gradient[1]], ids="-".join)
def test_executed_gradients(gradient, emulate):
    """Each once: on sm_80 and sm_90 in turn."""
    with emulate((80, 90)[GRADIENTS.index(gradient) % 2]):
        run_gradients(WIDE["v1"], dict([gradient]), "min")


NARROW = {
    "c40": Case("three pieces with a tail, tails in pixels and hidden; several tiles", n=2, c=40, h=9, w=8, drop=True),
    "c112": Case("one piece of 128 with a tail", n=2, c=112, h=5, w=7, ratio=2),
    "c176": Case("three pieces of 64 with a tail", n=2, c=176, h=5, w=7, ratio=2),
}
FUSED = [
    (plan, case, kernel, candidate.name)
    for plan, kernels in mlp_gradient_plan.FUSED_GRADIENTS.items()
    for case, shape in NARROW.items()
    for kernel, candidates in kernels.items()
    if all(list(others(problem(shape, False), HOPPER)) for others in kernels.values())
    for candidate in candidates(problem(shape, False), HOPPER)
    if kernel != "mlp_weight_gradient" or candidate.name in ("64x64-p64-s2", "library")
]
# Those that are candidates everywhere
ANYWHERE = {
    (kernel, case, candidate.name)
    for kernels in mlp_gradient_plan.FUSED_GRADIENTS.values()
    for case, shape in NARROW.items()
    for kernel, candidates in kernels.items()
    for candidate in candidates(problem(shape, False), tuning.for_arch(80))
}


# Each kernel of both plans once, at each width once.
@chosen(lambda candidate, turn: turn or FUSED.index(candidate) in (3, 9, 15, 19))
@pytest.mark.parametrize("candidate", FUSED, ids="-".join)
def test_gradients_with_the_hidden_on_chip(candidate, turn):
    plan, case, kernel, name = candidate
    with turn(FUSED.index(candidate), (80, 90) if (kernel, case, name) in ANYWHERE else (90,)):
        run_gradients(NARROW[case], {kernel: name}, "min", plan=plan)


@chosen(lambda variant, norm: f"{variant}-{norm}" in ("v1-rms", "v2-layer", "plain-simple"))
@pytest.mark.parametrize("norm", ["layer", "rms", "simple"])
@pytest.mark.parametrize("variant", ["v1", "v2", "plain"])
def test_gradients_of_variants_with_the_hidden_on_chip(variant, norm, turn):
    """Also with the hidden kept, which these plans do not read; without biases in V1."""
    case = dataclasses.replace(NARROW["c40"], variant=variant, norm=norm, activation="silu", bias=variant != "v1")
    with turn(0, (90,)):
        run_gradients(case, {"mlp_data_gradient": "m64-h32-w4"}, "balanced", plan="fused")
        if variant == "v2":
            return
        name = "h64-p16-w4"
        run_gradients(case, {"mlp_recomputed_weight_gradient": name}, "min", torch.float16, "recomputed")


@pytest.mark.parametrize(("variant", "memory"), [("v1", "min"), ("v2", "balanced")])
def test_gradients_of_whole_rows_by_separate_kernels(variant, memory):
    """The norm's backward in the epilogue of the product before it."""
    case = dataclasses.replace(NARROW["c40"], variant=variant)
    name = next(mlp_gradient_plan.input_gradient_candidates(problem(case), HOPPER)).name
    run_gradients(case, {"mlp_input_gradient": name}, memory)


@chosen(lambda ratio, norm: ratio == 100)
@pytest.mark.parametrize("norm", ["layer", "rms", "simple"])
@pytest.mark.parametrize("ratio", [0, 10, 100])
def test_folded_norm_at_large_means(ratio, norm):
    """The mean of a row is `ratio` times its deviation: it cancels, as the sums are of the rounded weights."""
    arguments = OPERATORS["mlp"].arguments(WIDE["v1"], torch.bfloat16)
    arguments |= {"x": (arguments["x"].float() + ratio).bfloat16(), "norm": norm, "residual": None}
    if norm != "layer":
        arguments["norm_bias"] = None
    with forcing(mlp_forward="gemm", mlp_expand="fold-64x64-k64-s2", mlp_project="64x64-k64-s2"):
        check_forward("mlp", arguments, "triton")
