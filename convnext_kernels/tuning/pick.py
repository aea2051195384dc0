"""The choice between candidates."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from convnext_kernels.tuning import autotune, cache, shipped
from convnext_kernels.tuning.cost import Candidate
from convnext_kernels.tuning.gpus import Gpu

Choice = Callable[[str, tuple, Sequence[Candidate], Gpu], Candidate | None]
_forced: ContextVar[Choice | None] = ContextVar("convnext_kernels_forced_choice", default=None)


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Let ``choice(kernel, problem, candidates, gpu)`` decide inside a ``with`` block; if it returns None, `pick` does.

    For tests and reports that must run every configuration.
    """
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def forcing() -> bool:
    """Whether `forced` is in effect, so that a choice must not be remembered."""
    return _forced.get() is not None


def remembered(plan: Callable[..., Candidate]) -> Callable[..., Candidate]:
    """Cache what `plan` returns for its arguments. Inside `forced` the cache is neither read nor written."""
    cached = functools.lru_cache(maxsize=1024)(plan)

    @functools.wraps(plan)
    def call(*arguments: object) -> Candidate:
        return (cached if _forced.get() is None else plan)(*arguments)

    call.cache_clear = cached.cache_clear
    return call


def predicted_seconds(candidate: Candidate, gpu: Gpu) -> float:
    """What candidates are compared by if none was timed: the predicted time times the handicap."""
    return candidate.seconds(gpu) * candidate.handicap


def predicted(candidates: Sequence[Candidate], gpu: Gpu) -> Candidate:
    """The candidate with the lowest predicted time, handicaps included; the first one if several are equal."""
    return min(candidates, key=lambda c: predicted_seconds(c, gpu))


def pick(
    kernel: str, problem: tuple, candidates: Sequence[Candidate], gpu: Gpu, timer: autotune.Timer | None = None
) -> Candidate:
    """Choose one of `candidates`: the fastest timed on this machine, else the fastest in a
    measurement that ships with the package, else the predicted one.

    `problem` has everything that the choice depends on. Its first element is the batch (or a size that grows with it):
    choices are kept for classes of problems whose first element rounds up to the same power of two. `timer` measures a
    candidate in seconds; it is used if autotuning is requested and the class was not timed yet. Raises ValueError
    without candidates.
    """
    if not candidates:
        raise ValueError(f"{kernel}: no candidates for {problem}")
    choice = _forced.get()
    if choice is not None and (chosen := choice(kernel, problem, candidates, gpu)) is not None:
        return chosen
    if len(candidates) == 1:
        return candidates[0]
    names = {c.name: c for c in candidates}
    if (name := cache.lookup(kernel, problem, gpu)) in names:  # another version's name may not be
        return names[name]
    if timer is not None and autotune.wanted() and (best := autotune.fastest(kernel, candidates, timer)) is not None:
        cache.remember(kernel, problem, gpu, best.name)
        return best
    if (name := shipped.lookup(kernel, problem, gpu)) in names:
        return names[name]
    return predicted(candidates, gpu)
