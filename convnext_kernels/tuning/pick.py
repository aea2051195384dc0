"""The choice between candidates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from convnext_kernels.tuning.cost import Candidate, seconds
from convnext_kernels.tuning.gpus import Gpu

Choice = Callable[[str, tuple, Sequence[Candidate]], Candidate | None]
_forced: ContextVar[Choice | None] = ContextVar("convnext_kernels_forced_choice", default=None)


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Let ``choice(kernel, problem, candidates)`` decide inside a ``with`` block; None leaves it to `pick`.

    For tests and reports that must reach every configuration.
    """
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def pick(kernel: str, problem: tuple, candidates: Sequence[Candidate], gpu: Gpu) -> Candidate:
    """Return the candidate with the lowest predicted time; the first of equals."""
    if (choice := _forced.get()) is not None and (chosen := choice(kernel, problem, candidates)) is not None:
        return chosen
    return min(candidates, key=lambda c: sum(seconds(work, gpu) for work in c.launches))
