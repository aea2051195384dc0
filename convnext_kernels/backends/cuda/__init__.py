"""CUDA C++ backend: the kernels of csrc/cuda, compiled with the package, for machines without Triton and for GPUs that
Triton does not support (compute capability 7.5). One file per op, forward and backward.
"""

import functools

import torch

from convnext_kernels.backends.cuda import native
from convnext_kernels.spec import OpSpec

DEVICES = ("cuda",)  # for "auto"; CPU tensors (the host build of the kernels) only if this backend is requested by name
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _device_problem() -> str | None:
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    if problem := native.extension().driver_problem():
        return f"the CUDA driver cannot run the kernels (built for {_built_for()}): {problem}"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable GPU"
    if problem := native.extension().device_problem(torch.cuda.current_device()):
        name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        where = f"{name} (compute capability {major}.{minor}; built for {_built_for()})"
        return f"the CUDA kernels contain no code for {where}: {problem}"
    return None


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here at all, or None."""
    return native.missing() or (None if native.on_host() else _device_problem())


def refuses(spec: OpSpec) -> str | None:
    """Why this op cannot be served at this configuration, or None."""
    if spec.device != native.device_type():
        return f"tensors are on {spec.device}, the CUDA kernels run on {native.device_type()}"
    for dtype in (spec.dtype, spec.compute_dtype):
        if dtype not in _DTYPES:
            return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if spec.op == "dwconv3d":
        return "there is no CUDA kernel for volumes; Triton, the CPU's kernels and eager PyTorch serve them"
    most = native.NORM_ROW_BYTES // spec.dtype.itemsize
    if spec.op in ("layernorm", "downsample") and spec.norm != "layer" and spec.channels > most:
        return f"norm={spec.norm!r} is served up to {most} channels of {spec.dtype}, got {spec.channels}"
    return _too_large(spec) if spec.op in ("dwconv", "block") else None


def _too_large(spec: OpSpec) -> str | None:
    """Why a depthwise kernel does not fit into the GPU's shared memory, or None: its weights and the smallest tile."""
    height, width = spec.kernel_size
    size = spec.compute_dtype.itemsize
    lanes = 2 if size == 2 else 1  # groups of four channels that 16 bytes fill
    needed = lanes * 16 * height * width + lanes * 4 * size * (height + 1) * (width + 6) + 64
    if needed <= _shared_bytes():
        return None
    return f"a {height}x{width} kernel needs {needed >> 10} KB of shared memory, this GPU has {_shared_bytes() >> 10}"


def _shared_bytes() -> int:
    """Shared memory that a block may have on the current GPU."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return native.extension().device_info(index)["shared_bytes"]


def compiled() -> dict[str, object]:
    """What the extension contains and whether the driver can run it, for ``convnext-kernels info``."""
    if reason := native.missing():
        return {"built": False, "reason": reason, "architectures": [], "toolkit": None, "driver": None}
    extension = native.extension()
    return {
        "built": True,
        "reason": "",
        "architectures": extension.ARCHITECTURES.split(),  # compute capabilities; PTX for the last
        "toolkit": extension.TOOLKIT,
        "driver": "" if native.on_host() else extension.driver_problem(),  # empty: no problem
    }


def describe() -> str:
    """One line for ``convnext-kernels info``."""
    if native.missing():
        return "CUDA C++ kernels, forward and backward"
    if native.on_host():
        return "CUDA C++ kernels, forward and backward, built for the CPU (for tests)"
    return f"CUDA C++ kernels, forward and backward, built with CUDA {native.extension().TOOLKIT} for {_built_for()}"


def _built_for() -> str:
    return ", ".join(f"sm_{architecture}" for architecture in native.extension().ARCHITECTURES.split())
