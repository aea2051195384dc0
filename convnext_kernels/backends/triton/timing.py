"""Timing candidates on a GPU, for autotuning."""

from collections.abc import Callable

import torch
import triton.testing

from convnext_kernels.backends.triton import device
from convnext_kernels.tuning import Candidate, autotune


def timer(run: Callable[[Candidate], object]) -> autotune.Timer | None:
    """A timer for `tuning.pick`: seconds of ``run(candidate)``, which must leave the same result however often it runs.

    None where nothing may be timed: unless autotuning was asked for, without a GPU, and while a CUDA graph is captured.
    """
    if not autotune.wanted() or device.interpreted() or device.type_() != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    return lambda candidate: triton.testing.do_bench(lambda: run(candidate), return_mode="median") / 1e3
