"""The bottleneck and the block as PTX, executed by an emulator that checks accesses and races.

Every plan, forward and gradients, with the hidden kept and computed again, at shapes with tails in pixels and channels.
"""

import pytest
import torch

from tests.operators import OPERATORS, check
from tests.ops.test_autocast import compare
from tests.shapes import Case

CASES = {
    "odd": Case("tails everywhere, no whole piece", n=2, c=40, h=5, w=7, drop=True),
    "odd v2": Case("the same with GRN: tiles within a sample", n=2, c=40, h=5, w=7, variant="v2"),
    "stage 1": Case("three pieces of 32", n=2, c=96, h=7, w=6),
    "wide": Case("a row in several programs, hidden not a power of two", n=1, c=272, h=3, w=5, ratio=2),
    "wide v2": Case("the same with GRN", n=2, c=272, h=3, w=5, ratio=2, variant="v2"),
}
ROWS = [
    ("fused", "min", "odd", torch.bfloat16),
    ("fused", "min", "odd v2", torch.bfloat16),
    ("fused", "min", "odd", torch.float16),
    ("fused", "min", "stage 1", torch.bfloat16),
    ("gemm", "balanced", "odd", torch.bfloat16),
    ("gemm", "min", "odd v2", torch.bfloat16),
    ("gemm", "balanced", "odd v2", torch.float16),
    ("gemm", "balanced", "wide", torch.bfloat16),
    ("gemm", "min", "wide v2", torch.bfloat16),
    ("cublas", "balanced", "odd", torch.float32),
    ("cublas", "min", "odd v2", torch.float32),
    ("cublas", "balanced", "wide", torch.bfloat16),
]


NHWC, NCHW = torch.channels_last, torch.contiguous_format
# The block runs everything that the bottleneck alone runs, but for its reading NCHW.
CALLS = [("block", NHWC, row) for row in ROWS] + [
    (op, NCHW, row) for op in ("mlp", "block") for row in ROWS if row[2:] == ("odd", torch.bfloat16)
]


@pytest.mark.parametrize(
    ("op", "layout", "row"),
    [
        pytest.param(*c, id=f"{c[0]}-{'nhwc' if c[1] is NHWC else 'nchw'}-{'-'.join(map(str, c[2]))}".replace(" ", "_"))
        for c in CALLS
    ],
)
def test_executed(op, layout, row, architecture, plan_of):
    run(op, layout, row, plan_of)


@pytest.mark.parametrize("row", [ROWS[3], ROWS[8]], ids=["fused", "gemm"])
@pytest.mark.parametrize("newer", [100, 120], ids=lambda arch: f"sm_{arch}")
def test_newer_architectures(newer, row, emulate, plan_of):
    """tcgen05 with tensor memory, and mma.sync in little shared memory."""
    with emulate(newer):
        run("block", NHWC, row, plan_of)


@pytest.mark.parametrize(
    ("plan", "memory", "case"),
    [("fused", "min", "odd"), ("fused", "min", "odd v2"), ("gemm", "balanced", "wide"), ("cublas", "min", "odd")],
)
def test_autocast(plan, memory, case, architecture, plan_of):
    """An fp32 x: the kernels of bf16 read and write fp32, and keep x and y in bf16."""
    arguments = OPERATORS["block"].arguments(CASES[case], torch.float32)
    arguments["x"] = arguments["x"].contiguous(memory_format=NHWC)
    with plan_of(plan):
        compare("block", arguments, "triton", memory=memory)


def run(op, layout, row, plan_of):
    plan, memory, case, dtype = row
    with plan_of(plan):
        check(op, CASES[case], dtype, layout, "triton", memory=memory)
