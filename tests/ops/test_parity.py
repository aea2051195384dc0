"""Every op, every case, every dtype, every backend: values, dtype and strides, forward and backward.

Every run takes what tests/shapes.py chooses of these, `always`; ``pytest -m extended`` the others.
"""

import pytest
import torch

from tests.operators import OPERATORS, expected, expected_gradients, gradients, laid_out
from tests.shapes import BOTTLENECK, DTYPES, always, cases, chosen
from tests.tolerance import assert_as_good_as_eager

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = [pytest.param(op, case, id=f"{op}-{case}") for op in OPERATORS for case in cases(op)]
FORMATS = (torch.contiguous_format, torch.channels_last)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@chosen(lambda op, case, dtype, kernel: always(op, case, dtype, kernel, 0))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_forward(op, case, dtype, kernel):
    operator = OPERATORS[op]
    arguments = operator.arguments(case, dtype)
    eager, reference = expected(op, case, dtype)
    # The interpreter takes seconds: each row in one of them.
    formats = FORMATS if kernel != "triton" else FORMATS[cases(op).index(case) % 2 :][:1]
    for memory_format in formats:
        x = laid_out(arguments["x"], memory_format)
        kept = x.clone()
        y = operator.serve(kernel, **{**arguments, "x": x})
        assert_as_good_as_eager(y, eager, reference, what=f"{op} of {memory_format}")
        if not all(laid_out(x, of) is x for of in FORMATS):
            assert laid_out(y, memory_format) is y
        assert torch.equal(x, kept), f"{op} wrote to its input"
        inputs = {t.untyped_storage().data_ptr() for t in (x, *arguments.values()) if isinstance(t, torch.Tensor)}
        assert y.untyped_storage().data_ptr() not in inputs, f"{op} returned its input"


@chosen(lambda op, case, dtype, kernel: always(op, case, dtype, kernel, 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_gradients(op, case, dtype, kernel):
    operator = OPERATORS[op]
    arguments = operator.arguments(case, dtype)
    dy, eager, reference = expected_gradients(op, case, dtype)
    # The hidden kept or computed again
    memory = {"memory": ("min", "balanced")[cases(op).index(case) // 2 % 2]} if op in BOTTLENECK else {}
    actual = gradients(lambda **a: operator.serve(kernel, **a, **memory), arguments, dy)
    for name, gradient in actual.items():
        # scale: the terms that a gradient sums up are about 1, so a smaller sum is one that cancelled.
        what = f"{op}: gradient of {name}"
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=what, scale=1.0)
        assert gradient.stride() == torch.empty_like(arguments[name]).stride(), name
