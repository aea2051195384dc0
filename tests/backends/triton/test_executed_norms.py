"""LayerNorm, GRN and downsampling as PTX, executed by an emulator that checks accesses and races.

What a GPU would run, compiled for two architectures, at shapes with tails in pixels and channels.
"""

import pytest
import torch

from tests.operators import check
from tests.shapes import Case

CASES = {
    "odd": Case("tails everywhere, a rest in H and W", n=2, c=13, h=7, w=9, patch=2),
    "vectors": Case("whole vectors, channels below the block", n=2, c=96, h=7, w=7, patch=2),
    "patches of 3": Case("vectors and a tail", n=1, c=40, h=8, w=7, patch=3),
    "wide": Case("a pixel in more than one warp", n=1, c=1000, h=3, w=3, patch=3),
}
# The dtype changes loads, stores and conversions, which the odd case reaches all of.
ROWS = [("odd", torch.float32), ("odd", torch.float16), *((case, torch.bfloat16) for case in CASES)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("case", "dtype"), ROWS)
@pytest.mark.parametrize("op", ["layernorm", "grn", "downsample"])
def test_executed(op, case, dtype, layout, architecture):
    check(op, CASES[case], dtype, layout, "triton")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_rows_beyond_registers(layout, architecture):
    """More channels than a block holds: the looping kernels."""
    check("layernorm", Case("wide rows", n=2, c=8200, h=1, w=2), torch.bfloat16, layout, "triton", runs=1)
