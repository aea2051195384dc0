"""NaN and infinity in x come out where eager has them, and nowhere else."""

import pytest
import torch

from tests.operators import OPERATORS
from tests.shapes import DTYPES, KERNELS, Case, chosen, rows

CASES = {
    "v1": Case("V1", n=3, c=18, h=6, w=5, k=3),
    "v2": Case("V2: one NaN reaches the whole sample, but no other", n=3, c=18, h=6, w=5, k=3, variant="v2"),
}
PLACES = {
    "one pixel of one channel": lambda x: x[1, 5, 3, 2],
    "a corner": lambda x: x[1, 0, 0, 0],
    "the last channel": lambda x: x[0, 17, 5, 3],  # column 4 is in no patch of the downsampling
    "a whole sample": lambda x: x[1],
}
VALUES = (torch.nan, torch.inf, -torch.inf)
ROWS = rows(OPERATORS, CASES)


def everyday(op, case, dtype, place, value, kernel):
    """Every value in every op on every kernel, in places and dtypes that go round."""
    row = [p.values for p in ROWS].index((op, case))
    turn = row + KERNELS.index(kernel) + VALUES.index(value)
    return [*PLACES].index(place) == turn % 4 and DTYPES.index(dtype) == turn % 3


@pytest.fixture(autouse=True)
def without_onednn(monkeypatch):
    """In PyTorch 2.11 its products in bf16 with AMX spread a NaN to another pixel: eager would be wrong."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@chosen(everyday)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case"), ROWS)
def test_nonfinite(op, case, dtype, place, value, kernel):
    arguments = OPERATORS[op].arguments(CASES[case], dtype)
    clean = OPERATORS[op].serve(kernel, **arguments)
    PLACES[place](arguments["x"]).fill_(value)
    y, eager = OPERATORS[op].serve(kernel, **arguments), OPERATORS[op].reference(**arguments)
    assert not eager.isfinite().all()
    assert torch.equal(y.isnan(), eager.isnan())
    assert torch.equal(y == torch.inf, eager == torch.inf)
    assert torch.equal(y == -torch.inf, eager == -torch.inf)
    # x is its own residual in the block, so samples without the value must be as they were.
    untouched = torch.ones(3, dtype=torch.bool)
    untouched[1 if place != "the last channel" else 0] = False
    torch.testing.assert_close(y[untouched], clean[untouched])


@pytest.mark.parametrize("op", ["mlp", "block"])
def test_dropped_sample_with_nan(op, kernel):
    """0 * NaN is NaN in eager; a kernel that skips dropped samples would hide it."""
    case = Case("drop", n=3, drop=True)
    arguments = OPERATORS[op].arguments(case, torch.float32)
    arguments["x"][0, 0, 0, 0] = torch.nan
    y, eager = OPERATORS[op].serve(kernel, **arguments), OPERATORS[op].reference(**arguments)
    assert torch.equal(y.isnan(), eager.isnan())
