"""What the extension measures for the benchmarks: arithmetic, copies, caches; and the pinning of threads.

No speed is asserted: only that there are numbers, and that wrong arguments are told.
"""

import math
import os
import sys

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
        ("copy_rate", (127, 1, 0.01), "bytes_per_thread"),
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
    previous = native.set_affinity(masks)
    try:
        assert previous == [sorted(main)] * len(masks)
        assert os.sched_getaffinity(0) == set(masks[0])
    finally:
        assert native.set_affinity(previous) == masks
    assert os.sched_getaffinity(0) == main
