"""What every run of the tests takes of the products: all pairs of factors, and the edges of vectors and tiles."""

import itertools
from collections.abc import Iterable

import pytest

from tests.operators import OPERATORS
from tests.ops import test_layouts, test_nonfinite
from tests.shapes import DTYPES, EAGER, KERNELS, TRITON, always, cases

FULL = DTYPES[:2]
DIRECTIONS = (0, 1)


def pairs(combinations: Iterable[tuple]) -> set:
    """Every two values that stand together, with the places of their factors."""
    return {pair for values in combinations for pair in itertools.combinations(enumerate(values), 2)}


def parity(op: str) -> tuple[list[tuple], list[tuple]]:
    """The product of the rows that are there for an op, but for fp16, and what is chosen from it."""
    product = list(itertools.product([case for case in cases(op) if op in case.ops], FULL, KERNELS, DIRECTIONS))
    return product, [values for values in product if always(op, *values)]


@pytest.mark.parametrize("op", OPERATORS)
def test_parity_has_all_pairs(op):
    product, chosen = parity(op)
    missing = pairs(product) - pairs(chosen)
    left_to_extended = {
        case
        for case in cases(op)
        if op in case.ops and (case.costly or (op == "block" and not (case.edge and (case.h, case.w) == (7, 5))))
    }
    assert missing == {((0, case), (2, TRITON)) for case in left_to_extended}


@pytest.mark.parametrize("op", OPERATORS)
def test_parity_has_every_edge_on_every_kernel(op):
    _, chosen = parity(op)
    edges = [case for case in cases(op) if case.edge]
    for case, kernel in itertools.product(edges, set(KERNELS) - {EAGER, TRITON}):
        assert {v[1::2] for v in chosen if v[::2] == (case, kernel)} == {*itertools.product(FULL, DIRECTIONS)}
    # below, at, at a multiple of and above a vector of 16 channels: in the interpreter too
    channels = {case.c for case in edges if (case.h, case.w) == (7, 5)}
    assert min(channels) < 16
    assert 16 in channels
    assert max(channels) > 32


def test_nonfinite_has_all_pairs_and_every_value_in_every_op_on_every_kernel():
    t = test_nonfinite
    product = list(itertools.product([p.values for p in t.ROWS], DTYPES, t.PLACES, t.VALUES, KERNELS))
    chosen = [values for values in product if t.everyday(*values[0], *values[1:])]
    assert pairs(chosen) == pairs(product)
    assert {(v[0], v[3], v[4]) for v in chosen} == {(v[0], v[3], v[4]) for v in product}
    assert len(chosen) == len(t.ROWS) * len(t.VALUES) * len(KERNELS)


def test_layouts_have_all_pairs():
    t = test_layouts
    product = list(itertools.product([p.values for p in t.ROWS], t.LAYOUTS, t.DTYPES, KERNELS))
    chosen = [values for values in product if t.everyday(*values[0], *values[1:])]
    assert pairs(chosen) == pairs(product)
    for backend in {name for name, _ in KERNELS}:
        of_backend = {(row, layout) for row, layout, _, kernel in chosen if kernel[0] == backend}
        assert of_backend == {*itertools.product([p.values for p in t.ROWS], t.LAYOUTS)}
