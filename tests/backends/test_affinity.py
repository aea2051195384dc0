"""The pinning of threads, which the benchmarks use."""

import os
import sys

import pytest
import torch

cpu = pytest.importorskip("convnext_kernels.backends.cpu")
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native backend: {cpu.unavailable()}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")


@pytest.fixture
def native():
    from convnext_kernels.backends.cpu.native import extension

    return extension()


@pytest.mark.parametrize(("masks", "message"), [([], "masks: none"), ([[1 << 20]], "masks: a CPU number")])
def test_wrong_masks(native, masks, message):
    with pytest.raises(ValueError, match=message):
        native.set_affinity(masks)


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
