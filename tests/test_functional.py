"""The public functions return memory of their own."""

import pytest
import torch

from tests.operators import OPERATORS
from tests.shapes import Case

CASE = Case("V1", n=2, c=12, h=6, w=5, k=3)


@pytest.mark.parametrize("op", OPERATORS)
def test_results_do_not_alias_inputs(op, backend):
    arguments = OPERATORS[op].arguments(CASE, torch.float32)
    y = OPERATORS[op].serve(backend, **arguments)
    storages = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    assert y.untyped_storage().data_ptr() not in storages
