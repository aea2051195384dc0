"""Native CPU backend: the C++ kernels of csrc/cpu, forward and backward.

Serves fp32, bf16 and fp16. Matmuls run in bf16 if the compute dtype is bf16 and the machine has AMX or AVX512_BF16,
else in fp32: then kernels convert 16-bit tensors to fp32 when they read them, and back when they write.
"""

import torch

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.native import ISA_VARIABLE, extension, isa, machine, supported_isas, use_isa
from convnext_kernels.spec import OpSpec

__all__ = [
    "ISA_VARIABLE",
    "describe",
    "extension",
    "has_tiles",
    "isa",
    "machine",
    "multiplies_bf16",
    "refuses",
    "supported_isas",
    "unavailable",
    "use_isa",
]

DEVICES = ("cpu",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why the compiled extension cannot be imported, or None."""
    return native.import_error()


def multiplies_bf16() -> bool:
    """Whether the instruction set in use has products of bf16; without the extension nobody knows: True."""
    return native.import_error() is not None or native.isa() in ("avx512bf16", "amx", "neon_bf16")


def has_tiles() -> bool:
    """Whether this machine has AMX, whatever instruction set is in use: what is kept must not change in between."""
    return native.import_error() is None and native.supported_isas()[-1] == "amx"


def refuses(spec: OpSpec) -> str | None:
    """Why this op cannot be served at this configuration, or None."""
    if spec.device != "cpu":
        return f"tensors are on {spec.device}, the CPU kernels run on cpu"
    for dtype in (spec.dtype, spec.compute_dtype):
        if dtype not in _DTYPES:
            return f"dtype {dtype} is not one of float32, bfloat16, float16"
    return None


def describe() -> str:
    """One line for ``convnext-kernels info``."""
    if native.import_error():
        return "native C++ kernels"
    compiled = native.extension()
    runtime = {"openmp": "PyTorch's OpenMP threads", "threads": "own threads"}[compiled.parallel_runtime()]
    where = f"ISA {isa()} (this machine: {', '.join(supported_isas())}), {runtime}"
    return f"native C++ kernels, forward and backward, {where}, compiled by {compiled.COMPILER.strip()}"
