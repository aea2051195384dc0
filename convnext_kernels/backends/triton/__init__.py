"""Triton backend: one file per op, forward and backward, for CUDA tensors (and other devices of Triton's driver)."""

import importlib.util
import os
import sys

import torch

from convnext_kernels.spec import OpSpec

DEVICES = ("cuda",)  # for "auto"; CPU tensors (interpreter, emulating driver) only if this backend is requested by name
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_ARCH = 80
MIN_TRITON = (3, 4)  # the first with `triton.knobs`; comes with PyTorch 2.8


def unavailable() -> str | None:
    """Why Triton cannot run here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if "triton" not in sys.modules and not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        return "PyTorch finds no usable GPU"  # without importing Triton, which takes a second
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"Triton {triton.__version__} is too old, expected {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer"
    from convnext_kernels.backends.triton import device

    try:
        kind = device.type_()
    except RuntimeError as error:  # of Triton: "0 active drivers ([]). There should only be one."
        return f"Triton finds no GPU: {error}"
    if kind == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major * 10 + minor < MIN_ARCH:
            return f"the GPU has compute capability {major}.{minor}, expected {MIN_ARCH // 10}.0 or newer"
    return None


def refuses(spec: OpSpec) -> str | None:
    """Why this op cannot be served at this configuration, or None."""
    from convnext_kernels.backends.triton import device

    if spec.device != device.type_():
        return f"tensors are on {spec.device}, Triton's kernels run on {device.type_()}"
    for dtype in (spec.dtype, spec.compute_dtype):
        if dtype not in _DTYPES:
            return f"dtype {dtype} is not one of float32, bfloat16, float16"
    return None


def describe() -> str:
    """One line for ``convnext-kernels info``."""
    if unavailable():
        return "Triton kernels, forward and backward"
    import triton

    from convnext_kernels.backends.triton import device

    if device.interpreted():
        where = "Triton's interpreter, on the CPU"
    elif torch.version.hip is not None:
        where = "for ROCm: compared with eager at the first use of each kind of call, never timed"
    else:
        where = f"planned for {device.gpu().name}"
    return f"Triton {triton.__version__} kernels, forward and backward, {where}"
