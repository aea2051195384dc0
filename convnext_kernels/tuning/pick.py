"""The choice between candidates: kernel configurations, plans, backends."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from convnext_kernels.tuning import cache, shipped
from convnext_kernels.tuning.cost import Candidate
from convnext_kernels.tuning.gpus import Gpu

Choice = Callable[[str, tuple, Sequence[Candidate], Gpu | str], Candidate | None]


class _Forced(NamedTuple):
    choice: Choice
    planned: list[Any] | None


_forced: ContextVar[_Forced | None] = ContextVar("convnext_kernels_forced_choice", default=None)

SETTINGS = (_forced.get, cache.generation_if_known)  # what choices depend on, see `calls.SETTINGS`


@contextmanager
def forced(choice: Choice, planned: list[Any] | None = None) -> Iterator[None]:
    """Let ``choice(kernel, problem, candidates, where)`` decide in a ``with`` block; `pick` does if it returns None.

    For tests and reports that must run every configuration, and for `tune`. With a list `planned`, Triton's launchers
    launch nothing: their programs (`backends/gpu/prepared.py`) are added to the list and they return None.
    """
    token = _forced.set(_Forced(choice, planned))
    try:
        yield
    finally:
        _forced.reset(token)


def forcing() -> bool:
    """Whether `forced` is in effect, so that a choice must not be remembered."""
    return _forced.get() is not None


def planned() -> list[Any] | None:
    """The list of `forced`, if nothing is to be launched."""
    found = _forced.get()
    return None if found is None else found.planned


def remembered(plan: Callable[..., Candidate]) -> Callable[..., Candidate]:
    """Cache what `plan` returns for its arguments until choices change. Inside `forced` the cache is not used."""

    @functools.lru_cache(maxsize=1024)
    def cached(_generation: int, *arguments: object) -> Candidate:
        return plan(*arguments)

    @functools.wraps(plan)
    def call(*arguments: object) -> Candidate:
        return cached(cache.generation(), *arguments) if _forced.get() is None else plan(*arguments)

    return call


def predicted_seconds(candidate: Candidate, gpu: Gpu) -> float:
    """What candidates are compared by if none was timed: the predicted time times the handicap."""
    return candidate.seconds(gpu) * candidate.handicap


def predicted(candidates: Sequence[Candidate], gpu: Gpu) -> Candidate:
    """The candidate with the lowest predicted time, handicaps included; the first one if several are equal."""
    return min(candidates, key=lambda c: predicted_seconds(c, gpu))


def pick(kernel: str, problem: tuple, candidates: Sequence[Candidate], where: Gpu | str) -> Candidate:
    """Choose one of `candidates`: the fastest timed on this machine, else the fastest in a measurement that ships with
    the package, else the predicted one; on a CPU, for which there are no predictions, the first.

    `problem` has everything that the choice depends on. Its first element is the batch (or a size that grows with it):
    choices are kept for classes of problems whose first element rounds up to the same power of two. `where` is the GPU,
    or what `cpus.machine` says about the CPU. Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError(f"{kernel}: no candidates for {problem}")
    force = _forced.get()
    if force is not None and (chosen := force.choice(kernel, problem, candidates, where)) is not None:
        return chosen
    if len(candidates) == 1:
        return candidates[0]
    names = {c.name: c for c in candidates}
    if (name := cache.lookup(kernel, problem, where)) in names:  # another version's name may not be
        return names[name]
    if isinstance(where, str):
        return candidates[0]
    if (name := shipped.lookup(kernel, problem, where)) in names:
        return names[name]
    return predicted(candidates, where)
