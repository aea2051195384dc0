"""Timing the candidates on request: ``CONVNEXT_KERNELS_AUTOTUNE=1``, or `autotune` for a block of code.

A launcher passes a timer to `pick` if timing is possible: on a GPU, outside of CUDA graph capture. The first call of
every class of problems then takes as long as all its candidates. The choice is kept on disk, so this happens once per
machine.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from convnext_kernels.tuning.cost import Candidate

ENVIRONMENT_VARIABLE = "CONVNEXT_KERNELS_AUTOTUNE"
Timer = Callable[[Candidate], float]  # seconds of one candidate, measured

_log = logging.getLogger("convnext_kernels")
_asked: bool | None = None  # for the whole process, not a context: autograd runs backward passes in its own threads


@contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Time kernel configurations inside a ``with`` block (with False: do not time them), in every thread."""
    global _asked
    before, _asked = _asked, enabled
    try:
        yield
    finally:
        _asked = before


def asked() -> bool | None:
    """What `autotune` says: time (True), do not (False), or nothing (None), so that the environment decides."""
    return _asked


def wanted() -> bool:
    """Whether candidates are to be timed."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "0") not in ("", "0") if _asked is None else _asked


def fastest(kernel: str, candidates: Sequence[Candidate], timer: Timer) -> Candidate | None:
    """The candidate with the lowest measured time; None if no candidate runs.

    A candidate that fails (for example because it needs too much shared memory) is skipped and logged.
    """
    best, least = None, math.inf
    for candidate in candidates:
        try:
            taken = timer(candidate)
        except Exception as error:  # compiler and driver raise many types; the other candidates may run
            _log.warning("autotune: %s %s does not run: %s", kernel, candidate.name, error)
            continue
        if taken < least:
            best, least = candidate, taken
    if best is not None:
        _log.info("autotune: %s: %s, %.1f us, of %d candidates", kernel, best.name, least * 1e6, len(candidates))
    return best
