"""Samples that lie further apart than 32-bit offsets reach (the memory between them is never touched)."""

import pytest
import torch

from convnext_kernels import list_backends
from tests.operators import OPERATORS, check, far_apart
from tests.shapes import Case, chosen

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for kernels that run on CPU memory")
CASE = Case("two samples, 4 GB apart", n=2, c=8, h=3, w=4, k=3, patch=1)


@chosen(lambda op, dtype, name: name == "cuda" or (op in ("dwconv", "grn", "block")) == (dtype == torch.float32))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_samples_far_apart(name, op, dtype):
    if not list_backends()[name].available:
        pytest.skip(list_backends()[name].reason)
    check(op, CASE, dtype, far_apart, name, runs=1, scale=1.0)
