"""What the extension measures for the benchmarks: arithmetic, copies, caches; and the pinning of threads.

No speed is asserted: only that there are numbers, and that wrong arguments are told.
"""

import math
import os
import sys
from contextlib import suppress

import pytest
import torch

cpu = pytest.importorskip("convnext_kernels.backends.cpu")
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native backend: {cpu.unavailable()}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")

KINDS = ("fma_fp32", "dot_bf16", "tile_bf16")


@pytest.fixture
def native():
    from convnext_kernels.backends.cpu.native import extension

    return extension()


def masks_of_process() -> dict[int, set[int]]:
    """Thread id -> CPUs, of all threads of this process."""
    masks = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # ended meanwhile: OpenMP's do when a team gets smaller
            masks[thread] = os.sched_getaffinity(thread)
    return masks


def test_rates(native):
    kinds = native.arithmetic_kinds()
    assert kinds == [kind for kind in KINDS if kind in kinds]
    assert "fma_fp32" in kinds
    assert ("tile_bf16" in kinds) == ("amx" in cpu.supported_isas())
    for threads in (1, 2, 5):
        rates = [native.arithmetic_rate(kind, threads, 0.01) for kind in kinds]
        rates += [native.copy_rate(size, threads, 0.01) for size in (128, 10_000, 3_000_000)]
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("arithmetic_rate", ("fma_fp64", 1, 0.01), "kind: fma_fp32, dot_bf16 or tile_bf16 expected, got 'fma_fp64'"),
        ("arithmetic_rate", ("fma_fp32", 0, 0.01), "threads or seconds"),
        ("arithmetic_rate", ("fma_fp32", 1, math.nan), "threads or seconds"),
        ("copy_rate", (127, 1, 0.01), "bytes_per_thread"),
        ("cache_bytes", (0,), "level"),
        ("set_affinity", ([],), "masks: none"),
        ("set_affinity", ([[1 << 20]],), "masks: a CPU number"),
    ],
)
def test_wrong_arguments(native, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(native, function)(*arguments)


@linux
def test_affinity_round_trip(native):
    main = os.sched_getaffinity(0)
    cpus = sorted(main)
    masks = [[cpus[rank % len(cpus)]] for rank in range(torch.get_num_threads())]
    native.set_affinity([sorted(main)] * len(masks))  # the threads exist, with masks that we know
    before = masks_of_process()
    previous = native.set_affinity(masks)
    try:
        assert previous == [sorted(main)] * len(masks)
        assert os.sched_getaffinity(0) == set(masks[0])
        now = masks_of_process()  # threads of other tests may end or start at any time
        changed = [now[thread] for thread in now.keys() & before if now[thread] != before[thread]]
        assert sorted(map(sorted, changed)) == sorted(mask for mask in masks if set(mask) != main)
    finally:
        assert native.set_affinity(previous) == masks
    assert os.sched_getaffinity(0) == main
    after = masks_of_process()
    assert all(after[thread] == before[thread] for thread in after.keys() & before)
