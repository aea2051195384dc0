"""Where Triton's kernels run: on a GPU, or on CPU tensors in the interpreter or with an emulating driver."""

import functools

import torch
import triton

from convnext_kernels import tuning

if triton.knobs.runtime.interpret:
    from convnext_kernels.backends.triton import interpreter

    interpreter.repair()


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set, so that kernels run as Python on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def type_() -> str:
    """Device type of the tensors that kernels take. Raises RuntimeError if Triton has no driver."""
    return "cpu" if interpreted() else triton.runtime.driver.active.get_active_torch_device().type


def lanes() -> int:
    """Threads of a warp: 32, on AMD's data center GPUs 64; 32 for the interpreter."""
    return 32 if interpreted() else triton.runtime.driver.active.get_current_target().warp_size


def gpu() -> tuning.Gpu:
    """The data sheet of the GPU that kernels run on; for the interpreter that of an H100.

    Not cached, because an emulating driver may be installed and removed within one process.
    """
    if interpreted():
        return tuning.for_arch(90)
    target = triton.runtime.driver.active.get_current_target()
    return _gpu(target.arch, torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.cache
def _gpu(arch: int | str, index: int | None) -> tuning.Gpu:
    return tuning.for_device("" if index is None else torch.cuda.get_device_name(index), arch)
