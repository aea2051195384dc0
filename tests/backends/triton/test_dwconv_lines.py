"""Kernels of one row or one column with two channels per thread, in the interpreter: both images in channels_last."""

import pytest
import torch

from tests.backends.triton import interpreted
from tests.operators import check
from tests.shapes import Case

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
CASES = [
    Case("a moved last group", n=2, c=6, h=3, w=9, k=(1, 11)),
    Case("two strips of lines", n=1, c=34, h=12, w=5, k=(11, 1)),
]


@interpreted  # test_executed_dwconv.py has the compiled kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_of_channels(case, dtype):
    check("dwconv", case, dtype, torch.channels_last, "triton", runs=1, scale=1.0)
