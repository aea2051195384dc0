"""All ops but the convolution as PTX, executed by an emulator that checks accesses and races.

Of the bottleneck and the block every plan, forward and gradients, with the hidden kept and computed again. Shapes have
tails in pixels and channels.
"""

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import tuning
from tests.operators import OPERATORS, check
from tests.ops.test_autocast import compare
from tests.shapes import Case
from tests.tolerance import randomize_

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


def plan_of(plan):
    """Force the bottleneck's plan; of "gemm" all products are ours."""

    def choice(kernel, problem, candidates, gpu):
        if kernel in ("mlp_forward", "mlp_backward"):
            return next((c for c in candidates if c.config["plan"] == plan), None)
        return candidates[0] if kernel.startswith("mlp_") else None

    return tuning.forced(choice)


def run(op, layout, row):
    plan, memory, case, dtype = row
    with plan_of(plan):
        check(op, CASES[case], dtype, layout, "triton", memory=memory)


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
def test_executed(op, layout, row, architecture):
    run(op, layout, row)


@pytest.mark.parametrize("row", [ROWS[3], ROWS[8]], ids=["fused", "gemm"])
@pytest.mark.parametrize("newer", [100, 120], ids=lambda arch: f"sm_{arch}")
def test_newer_architectures(newer, row, emulate):
    """tcgen05 with tensor memory, and mma.sync in little shared memory."""
    with emulate(newer):
        run("block", NHWC, row)


@pytest.mark.parametrize(
    ("plan", "memory", "case"),
    [("fused", "min", "odd"), ("fused", "min", "odd v2"), ("gemm", "balanced", "wide"), ("cublas", "min", "odd")],
)
def test_autocast(plan, memory, case, architecture):
    """An fp32 x: the kernels of bf16 read and write fp32, and keep x and y in bf16."""
    arguments = OPERATORS["block"].arguments(CASES[case], torch.float32)
    arguments["x"] = arguments["x"].contiguous(memory_format=NHWC)
    with plan_of(plan):
        compare("block", arguments, "triton", memory=memory)


NORMS = {
    "odd": Case("tails everywhere, a rest in H and W", n=2, c=13, h=7, w=9, patch=2),
    "vectors": Case("whole vectors, channels below the block", n=2, c=96, h=7, w=7, patch=2),
    "patches of 3": Case("vectors and a tail", n=1, c=40, h=8, w=7, patch=3),
    "wide": Case("a pixel in more than one warp", n=1, c=1000, h=3, w=3, patch=3),
}
# The dtype changes loads, stores and conversions, which the odd case reaches all of.
NORM_ROWS = [("odd", torch.float32), ("odd", torch.float16), *((case, torch.bfloat16) for case in NORMS)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("case", "dtype"), NORM_ROWS)
@pytest.mark.parametrize("op", ["layernorm", "grn", "downsample"])
def test_norms_executed(op, case, dtype, layout, architecture):
    check(op, NORMS[case], dtype, layout, "triton")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_rows_beyond_registers(layout, architecture):
    """More channels than a block holds: the looping kernels."""
    check("layernorm", Case("wide rows", n=2, c=8200, h=1, w=2), torch.bfloat16, layout, "triton", runs=1)


@pytest.mark.parametrize("use_grn", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inlined_kernels(architecture, dtype, use_grn):
    """Programs for AOTInductor, whose ops are launches, compute what a call computes."""
    block = randomize_(ck.FusedConvNeXtBlock(32, use_grn=use_grn)).to(dtype).eval()
    x = torch.randn(2, 32, 7, 5).to(dtype)
    with torch.no_grad():
        with ck.keep_ops():
            program = torch.export.export(block, (x,))
        with ck.inline_kernels():
            program = program.run_decompositions({})
        assert not any("convnext_kernels" in str(node.target) for node in program.graph.nodes)
        with ck.use_backend("triton"):
            assert torch.equal(program.module()(x), block(x))
