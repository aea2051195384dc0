"""The compiled extension: whether it can be imported, and which instruction set it uses."""

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from convnext_kernels.spec import BackendError
from convnext_kernels.tuning import cpus

ISA_VARIABLE = "CONVNEXT_KERNELS_CPU_ISA"
BUILD_HINT = "install g++ 11 or newer, then install this package again; CNK_NATIVE=1 makes a missing compiler an error"
CALLS = 1  # as in csrc/bindings/module.cpp: both count up when the arguments of its functions change, or their meaning
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_forced: ContextVar[str | None] = ContextVar("convnext_kernels_cpu_isa", default=None)
forced_isa = _forced.get  # what `use_isa` forces, or None


@functools.cache
def _load() -> ModuleType | str:
    try:
        extension = importlib.import_module("convnext_kernels._native")
    except ModuleNotFoundError:
        return f"this installation was built without the CPU kernels ({BUILD_HINT})"
    except ImportError as error:
        return f"the compiled extension cannot be imported ({error})"
    if getattr(extension, "CALLS", None) != CALLS:  # an editable installation whose sources moved on
        return f"the compiled extension {extension.__file__} is older than this package: install the package again"
    return extension


def import_error() -> str | None:
    """Why the extension cannot be imported, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def extension() -> ModuleType:
    """Return the compiled extension. Raises BackendError when it cannot be imported."""
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(f"backend 'cpu' is not available: {loaded}")
    return loaded


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets of this build that this machine has, slowest first."""
    return tuple(extension().supported_isas())


def _check_isa(name: str, source: str) -> str:
    if name not in supported_isas():
        raise BackendError(f"{source}: expected one of {', '.join(supported_isas())} (this machine), got {name!r}")
    return name


@functools.cache
def requested() -> str | None:
    """The environment variable, which is read once: a look takes 0.7 us."""
    return os.environ.get(ISA_VARIABLE)


def isa() -> str:
    """Return the instruction set in use: that of `use_isa`, else CONVNEXT_KERNELS_CPU_ISA, else the machine's best.

    Raises BackendError if the requested one is unknown or this machine does not have it.
    """
    name = _forced.get() or requested()
    return _check_isa(name, ISA_VARIABLE) if name else supported_isas()[-1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction set inside a ``with`` block (current thread). Raises BackendError as `isa` does."""
    token = _forced.set(_check_isa(name, "use_isa"))
    try:
        yield
    finally:
        _forced.reset(token)


def machine() -> str:
    """What timed choices are kept for (`tuning.cpus.machine`)."""
    return cpus.machine("no extension" if import_error() else isa(), torch.get_num_threads())


@functools.cache
def isa_code(name: str) -> int:
    """The extension's number for an instruction set."""
    return extension().ISAS.index(name)


@functools.cache
def norm_code(name: str) -> int:
    """The extension's number for a norm of `variants`."""
    return extension().NORMS.index(name)


@functools.cache
def activation_code(name: str) -> int:
    """The extension's number for an activation of `variants`."""
    return extension().ACTIVATIONS.index(name)


def pad_channels(channels: int) -> int:
    """The length to which the kernels pad a vector of `channels` elements."""
    align = extension().CHANNEL_ALIGN
    return -(-channels // align) * align


def threads(operations: int, most: int | None = None) -> int:
    """How many threads to request: PyTorch's number or `most`, fewer for little work.

    Waking a team costs some microseconds, which is more than it saves below about 100,000 multiply-adds a thread.
    """
    return max(1, min(most or torch.get_num_threads(), operations // 100_000))
