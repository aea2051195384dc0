"""Timing candidates on a GPU, for autotuning."""

from collections.abc import Callable, Iterable

import torch
import triton.testing

from convnext_kernels import tuning
from convnext_kernels.backends.gpu import prepared as programs
from convnext_kernels.backends.triton import device
from convnext_kernels.tuning import Candidate, autotune
from convnext_kernels.tuning.pick import predicted_seconds

MOST = 8  # candidates that are compiled and timed: those with the lowest predicted times
_settled: set[tuple] = set()  # (kernel, problem, GPU) whose choice was timed, so that later calls cost a lookup


def timer(run: Callable[[Candidate], object]) -> autotune.Timer | None:
    """A timer for `tuning.pick`: seconds of ``run(candidate)``, which must give the same result however often it runs.

    None if nothing may be timed: autotuning is not requested, there is no GPU, or a CUDA graph is being captured.
    """
    if programs.recorder() is not None:  # the tensors have no memory
        return None
    if not autotune.wanted() or device.interpreted() or device.type_() != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    return lambda candidate: triton.testing.do_bench(lambda: run(candidate), return_mode="median") / 1e3


def choose(
    kernel: str,
    plan: Callable[[tuple, tuning.Gpu], Candidate],
    problem: tuple,
    gpu: tuning.Gpu,
    candidates: Iterable[Candidate],
    run: Callable[[Candidate], object],
) -> Candidate:
    """The candidate that a launcher runs: ``plan(problem, gpu)``, or, while autotuning, the fastest with its tensors.

    `plan` is the `functools.lru_cache` around ``tuning.pick(kernel, ...)``. `candidates` and `run` are only used if
    something is timed.
    """
    key = (kernel, problem, gpu)
    measure = timer(run) if autotune.wanted() and key not in _settled else None
    if measure is None:
        return plan(problem, gpu)
    likely = sorted(candidates, key=lambda candidate: predicted_seconds(candidate, gpu))[:MOST]
    chosen = tuning.pick(kernel, problem, likely, gpu, measure)
    _settled.add(key)
    plan.cache_clear()  # it may remember a choice that was made before anything was timed
    return chosen
