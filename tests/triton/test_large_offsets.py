"""Samples that lie further apart than 32-bit offsets reach (the memory between them is never touched)."""

import pytest
import torch

from convnext_kernels import list_backends
from tests.operators import OPERATORS, expected, expected_gradients, far_apart, gradients
from tests.shapes import Case, chosen
from tests.tolerance import assert_as_good_as_eager

pytestmark = pytest.mark.skipif(
    not list_backends()["triton"].available or torch.cuda.is_available(), reason="for the interpreter, on CPU memory"
)
CASE = Case("two samples, 4 GB apart", n=2, c=8, h=3, w=4, k=3, patch=1)


@chosen(lambda op, dtype: (op in ("dwconv", "grn", "block")) == (dtype == torch.float32))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_samples_far_apart(op, dtype):
    arguments = OPERATORS[op].arguments(CASE, dtype)
    arguments["x"] = far_apart(arguments["x"], 1, 32, 8)
    call = OPERATORS[op].call
    y = call(**arguments, backend="triton")
    assert_as_good_as_eager(y, *expected(op, CASE, dtype))
    dy, eager, reference = expected_gradients(op, CASE, dtype)
    for name, gradient in gradients(lambda **a: call(**a, backend="triton"), arguments, dy).items():
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=name, scale=1.0)
