import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from convnext_kernels import tuning

# tests/conftest.py sets the variable on machines without a GPU.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "1", reason="for Triton's interpreter: set TRITON_INTERPRET=1"
)


def nothing(candidates: Sequence[tuning.Candidate]) -> tuning.Candidate | None:
    return None


@contextmanager
def forcing(otherwise: Callable = nothing, **wanted: str | None) -> Iterator[set[str]]:
    """``with forcing(mlp_forward="gemm") as taken:``: candidates by name, and the kernels of which one was taken."""
    taken = set()

    def choice(kernel, _problem, candidates, _gpu):
        found = next((c for c in candidates if c.name == wanted.get(kernel)), None)
        taken.update([] if found is None else [kernel])
        return found or otherwise(candidates)

    with tuning.forced(choice):
        yield taken
