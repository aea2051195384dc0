"""Timing of candidates against each other: interleaved, warmed up, on a steady allocator."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

WARMUP = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every timed call of one candidate."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def minimum(self) -> float:
        """Minimum in milliseconds."""
        return min(self.milliseconds)


def _cpu_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _cuda_call(function: Callable[[], object]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: str = "cpu",
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time the candidates in turn (A B A B ...), so that a change of the machine's speed meets all of them.

    Each is called WARMUP times first; `on_round` is called after every round, WARMUP + `repeats` in all.
    """
    import torch

    call = _cuda_call if device == "cuda" else _cpu_call
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for number in range(WARMUP + repeats):
            for name, function in candidates.items():
                elapsed = call(function)
                if number >= WARMUP:
                    samples[name].append(elapsed)
            on_round()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, else None."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def steady_allocator() -> Iterator[bool]:
    """Let the process keep freed memory inside; yields whether that is possible here (glibc).

    By default glibc hands large temporaries back to the system and faults them in again at every call. That
    costs eager PyTorch, which has more of them, up to ten times the time of its own work: a comparison
    without this would flatter fused kernels.
    """
    libc = glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield libc is not None
    finally:
        if libc is not None:  # the defaults: 65536 mappings; trim at twice the largest dynamic mmap threshold
            libc.mallopt(_M_MMAP_MAX, 65536)
            libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
            libc.malloc_trim(0)
