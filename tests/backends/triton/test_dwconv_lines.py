"""Kernels of one row or one column with two channels per thread, in the interpreter: both images in channels_last."""

import pytest
import torch

from tests.operators import OPERATORS, expected, expected_gradients, gradients
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

triton = pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
CASES = {
    "row": Case("a moved last group", n=2, c=6, h=3, w=9, k=(1, 11)),
    "column": Case("two strips of lines", n=1, c=34, h=12, w=5, k=(11, 1)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pairs_of_channels(name, dtype):
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is not set; test_executed_dwconv.py has the compiled kernels")
    operator, case = OPERATORS["dwconv"], CASES[name]
    arguments = operator.arguments(case, dtype)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    dy, eager, reference = expected_gradients("dwconv", case, dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def call(**a):
        return operator.serve("triton", **a)

    assert_as_good_as_eager(call(**arguments), *expected("dwconv", case, dtype))
    for argument, gradient in gradients(call, arguments, dy).items():
        assert_as_good_as_eager(gradient, eager[argument], reference[argument], what=argument, scale=1.0)
