"""Timing of candidates: interleaved, warmed up, pinned, with an allocator that keeps freed memory."""

import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from convnext_kernels.backends.cpu import native

WARMUP, MOST_WARMUP = 3, 10  # calls of each candidate before it is timed
BURST_SECONDS, BURST_CALLS = 0.02, 10  # a burst, at least one call, ends when either is reached
FEW_FAULTS = 64  # page faults in a round of candidates, 0.25 MiB
LONG_ROUND = 1.0  # seconds: page faults are a small part of such long calls
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU (H200: 50 MB, B200: 126 MB)


@dataclass(frozen=True)
class Times:
    """Milliseconds of every timed call of a candidate: a tuple for each round, in order."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def minimum(self) -> float:
        """Fastest call, in milliseconds."""
        return min(map(min, self.rounds))

    @property
    def median(self) -> float:
        """Median of all calls, in milliseconds."""
        return statistics.median(call for calls in self.rounds for call in calls)

    @property
    def spread(self) -> float:
        """Half the range of the medians of the rounds, over the median: 0.05 means that rounds are within about 5 %."""
        medians = [statistics.median(calls) for calls in self.rounds]
        return (max(medians) - min(medians)) / 2 / self.median


def _page_faults() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _busy_threads() -> int:
    """Number of running threads of this process without the calling one; 0 on other systems than Linux.

    This reads the states of the threads, not their CPU time: Linux updates the CPU time of a thread on another core
    only at the next tick of the kernel, up to 10 ms later.
    """
    own, busy = str(threading.get_native_id()), 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has just ended
            state = stat.read_text().rpartition(")")[2].split()[0]
            busy += state == "R" and stat.parent.name != own
    return busy


def settle(limit: float = 0.5) -> None:
    """Wait until no other thread of this process runs: threads of the last candidate's runtime spin after its call.

    They spin on the cores that the threads of the next candidate need, which would then look slower than it is.
    Measured on two cores of an AMD EPYC: the threads of ONNX Runtime spin for 30 ms, and eager PyTorch, called next,
    took twice its time.
    """
    end = time.perf_counter() + limit
    while _busy_threads() and time.perf_counter() < end:
        time.sleep(0.001)


def _cpu_burst(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> list[float]:
    settle()
    samples = []
    for _ in range(calls):
        start = clock()
        function()
        samples.append((clock() - start) * 1e3)
    return samples


def _cuda_burst(function: Callable[[], object], calls: int, _clock: Callable[[], float]) -> list[float]:
    """Each call starts with its data outside L2, as in a network, and is launched while the flush still runs."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    bursts: bool = False,
    training: bool = False,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time the candidates in turn, round by round, so that a change of the machine's speed affects all of them.

    Each is called WARMUP times first, and up to MOST_WARMUP times while short calls still cause page faults: glibc
    reuses an aligned block only if its address fits, which takes up to eight calls (2.36). A round times one call of
    each candidate. With `bursts` it times as many calls as BURST_CALLS and BURST_SECONDS allow, after one untimed call,
    because that one finds the data of the candidate before in the caches. `training` enables gradients. `clock` is not
    for a GPU, which has events.
    """
    burst = _cuda_burst if device == "cuda" else _cpu_burst
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    with torch.enable_grad() if training else torch.inference_mode():
        fastest = dict.fromkeys(candidates, float("inf"))
        for number in range(MOST_WARMUP):
            faults, start = _page_faults(), time.perf_counter()
            for name, function in candidates.items():
                fastest[name] = min(fastest[name], *burst(function, 1, clock))
            faults = _page_faults() - faults
            if number >= WARMUP - 1 and (faults < FEW_FAULTS or time.perf_counter() - start > LONG_ROUND):
                break
        limits = {name: max(1, int(BURST_SECONDS * 1e3 / best)) if bursts else 1 for name, best in fastest.items()}
        calls = {name: min(BURST_CALLS, limit) for name, limit in limits.items()}
        for _ in range(rounds):
            for name, function in candidates.items():
                warm = calls[name] > 1
                samples[name].append(tuple(burst(function, calls[name] + warm, clock)[warm:]))
    return {name: Times(tuple(values)) for name, values in samples.items()}


def fastest(
    call: Callable[[], object],
    seconds: float,
    calls: int = 1,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a call in the fastest loop of `calls`, of loops that take `seconds`; `wait` is called between them."""
    for _ in range(3):
        call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        start = clock()
        for _ in range(calls):
            call()
        best = min(best, (clock() - start) / calls)
    return best


# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, else None."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextmanager
def steady_allocator() -> Iterator[None]:
    """Let the process keep freed memory inside the context, where the C library is glibc.

    By default glibc returns large temporaries to the system, and their pages fault again at every call. This costs
    eager PyTorch, which has more of them, up to ten times the time of its own work. Without this context the fused
    kernels would look too good.
    """
    libc = glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        if libc is not None:  # the defaults: 65536 mappings; trim at twice the largest dynamic mmap threshold
            libc.mallopt(_M_MMAP_MAX, 65536)
            libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
            libc.malloc_trim(0)


# If one of these is set, the user has placed the threads.
PINNING_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND")


def _distinct_cores() -> list[int]:
    """CPUs that this process may use: first one per core, then the second hardware threads."""
    order, later, seen = [], [], set()
    for cpu in sorted(os.sched_getaffinity(0)):
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = file.read_text() if file.exists() else str(cpu)
        (later if core in seen else order).append(cpu)
        seen.add(core)
    return order + later


@contextmanager
def pinned() -> Iterator[tuple[list[int], str]]:
    """Pin each of PyTorch's OpenMP threads to its own core inside the context; yields (CPUs, reason if none).

    Start other runtimes (OpenVINO, ONNX Runtime) before: they create and place their threads according to the affinity
    at their start.
    """
    threads = torch.get_num_threads()
    set_by = [name for name in PINNING_VARIABLES if os.environ.get(name)]
    reason = ""
    if set_by:
        reason = f"left to {set_by[0]}={os.environ[set_by[0]]}"
    elif not hasattr(os, "sched_getaffinity"):
        reason = f"not possible on {platform.system()}"
    elif native.import_error():
        reason = f"needs the compiled extension: {native.import_error()}"
    elif threads > len(os.sched_getaffinity(0)):
        reason = f"{threads} threads share {len(os.sched_getaffinity(0))} CPUs"
    if reason:
        yield [], reason
        return
    cpus = _distinct_cores()[:threads]
    before = native.extension().set_affinity([[cpu] for cpu in cpus])
    try:
        yield cpus, ""
    finally:
        native.extension().set_affinity(before)
