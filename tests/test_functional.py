"""The public functions: their defaults, and how they fit together."""

import inspect

import pytest
import torch

from tests.operators import OPERATORS
from tests.shapes import Case

CASE = Case("V1", n=2, c=12, h=6, w=5, k=3)


@pytest.mark.parametrize("op", OPERATORS)
def test_signature(op):
    """Options are keyword-only, and every function takes a backend."""
    parameters = inspect.signature(OPERATORS[op].call).parameters
    assert parameters["backend"].default == "auto"
    for name in ("backend", "eps", "grn_eps", "dilation", "gamma", "drop_scale"):
        if name in parameters:
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
    assert OPERATORS[op].call.__doc__


@pytest.mark.parametrize("op", OPERATORS)
def test_results_do_not_alias_inputs(op, backend):
    arguments = OPERATORS[op].arguments(CASE, torch.float32)
    y = OPERATORS[op].serve(backend, **arguments)
    storages = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    assert y.untyped_storage().data_ptr() not in storages
