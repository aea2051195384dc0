"""The whole block in one kernel: forced, in the interpreter and as PTX."""

import pytest
import torch

from convnext_kernels import tuning
from tests.backends.triton import forcing
from tests.operators import OPERATORS, check, expected
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton.plans import block_plan

TAILS = Case("several tiles, tails in pixels and channels, dropped samples", n=2, c=40, h=9, w=8, ratio=2, drop=True)
PLAIN = Case("no parameter that may be missing", n=2, c=17, k=3, variant="plain", bias=False, norm="rms")
NAMES = [
    candidate.name
    for candidate in block_plan.candidates(block_plan.Problem(2, 40, 9, 8, 80, 7, "bfloat16"), tuning.for_arch(80))
    if candidate.name != block_plan.SEPARATE
]


def run(case, name, dtype=torch.bfloat16, layout=torch.channels_last):
    """Check the result; return whether the block's plan was a choice."""
    arguments = OPERATORS["block"].arguments(case, dtype)
    arguments["x"] = arguments["x"].contiguous(memory_format=layout)
    with forcing(block_forward=name) as taken:
        y = OPERATORS["block"].serve("triton", **arguments)
    assert_as_good_as_eager(y, *expected("block", case, dtype))
    return "block_forward" in taken


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [TAILS, PLAIN], ids=["tails", "plain"])
def test_every_candidate(case, dtype, name):
    assert run(case, name, dtype)


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        (PLAIN, torch.float32, torch.channels_last),
        (PLAIN, torch.bfloat16, torch.contiguous_format),
        (Case("V2", c=16, k=3, variant="v2"), torch.bfloat16, torch.channels_last),
        (Case("a larger kernel", c=16, k=9), torch.bfloat16, torch.channels_last),
        (Case("a dilation", c=16, k=3, dilation=2), torch.bfloat16, torch.channels_last),
        (Case("more channels", c=100, k=3, ratio=1), torch.bfloat16, torch.channels_last),
    ],
    ids=["fp32", "nchw", "v2", "9x9", "dilation", "channels"],
)
def test_two_kernels_serve_the_others(case, dtype, layout):
    assert not run(case, NAMES[0], dtype, layout)


def test_not_for_training():
    """The gradient needs y."""
    with forcing(block_forward=NAMES[0]):
        check("block", PLAIN, torch.bfloat16, torch.channels_last, "triton", runs=1)


@pytest.mark.parametrize("name", NAMES)
def test_executed(name, architecture):
    assert run(TAILS, name)
