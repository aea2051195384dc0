"""LayerNorm, GRN and downsampling as PTX, executed by an emulator that checks accesses and races.

What a GPU would run, compiled for two architectures, at shapes with tails in pixels and channels.
"""

import pytest
import torch

from tests.operators import OPERATORS, expected, expected_gradients, gradients
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

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
    operator = OPERATORS[op]
    arguments = operator.arguments(CASES[case], dtype)
    arguments["x"] = arguments["x"].contiguous(memory_format=layout)
    assert_as_good_as_eager(operator.serve("triton", **arguments), *expected(op, CASES[case], dtype))
    dy, eager, reference = expected_gradients(op, CASES[case], dtype)
    dy = dy.contiguous(memory_format=layout)
    actual = gradients(lambda **a: operator.serve("triton", **a), arguments, dy)
    again = gradients(lambda **a: operator.serve("triton", **a), arguments, dy)
    for name, gradient in actual.items():
        assert torch.equal(gradient, again[name]), f"{name} differs from run to run"
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_rows_beyond_registers(layout, architecture):
    """More channels than a block holds: the looping kernels."""
    case = Case("wide rows", n=2, c=8200, h=1, w=2)
    arguments = OPERATORS["layernorm"].arguments(case, torch.bfloat16)
    arguments["x"] = arguments["x"].contiguous(memory_format=layout)
    y = OPERATORS["layernorm"].serve("triton", **arguments)
    assert_as_good_as_eager(y, *expected("layernorm", case, torch.bfloat16))
    dy, eager, reference = expected_gradients("layernorm", case, torch.bfloat16)
    actual = gradients(lambda **a: OPERATORS["layernorm"].serve("triton", **a), arguments, dy)
    for name, gradient in actual.items():
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=name)
