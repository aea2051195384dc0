"""Peak memory of one forward pass."""

import functools
import gc
import statistics
import threading
from collections.abc import Callable

import psutil
import torch

from convnext_kernels.bench.timing import glibc

INTERVAL = 1e-3  # seconds between two samples of the resident set
RUNS = 3  # single runs differ by up to a third, because the allocator reuses freed blocks differently

_WHAT = {
    "cpu": "the process's resident set, sampled every millisecond",
    "cuda": "the memory that PyTorch's CUDA allocator holds for tensors",
}
METHOD = {
    device: f"Peak memory: growth of {what}, during the first and the second forward pass of a new model; medians of "
    "three models. A pass of a copy loads code and libraries first. The first pass includes the weights that a backend "
    "packs and keeps. The model's own weights are never included."
    for device, what in _WHAT.items()
}


def _resident_growth(function: Callable[[], object]) -> int:
    process, done = psutil.Process(), threading.Event()
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)
    start = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return max(peak, process.memory_info().rss) - start


def _cuda_growth(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def peak_growth(build: Callable[[], Callable[[object], object]], x: object, device: str) -> tuple[int, int]:
    """Peak growth of memory in bytes during the first and the second pass of ``build()`` on `x`; see METHOD."""
    measure = _cuda_growth if device == "cuda" else _resident_growth
    found = []
    with torch.inference_mode():
        build()(x)
        for _ in range(RUNS):
            model = build()
            gc.collect()
            found.append([measure(functools.partial(model, x)) for _ in range(2)])
            del model
    first, second = (int(statistics.median(values)) for values in zip(*found, strict=True))
    return first, second
