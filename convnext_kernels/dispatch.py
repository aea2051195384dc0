"""The choice of a backend.

Precedence: the ``backend=`` argument of a module or function, then the innermost `use_backend`, then the
environment variable ``CONVNEXT_KERNELS_BACKEND``, then "auto". Of the backends that can serve the call, "auto" takes
the one that was timed to be the fastest (`tuning.tune`), else the first of `backends.NAMES`. A backend that is
requested by name serves the call or raises `BackendError`.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import backends as _backends
from convnext_kernels import calls, trial, tuning
from convnext_kernels.spec import BackendError, OpSpec, UnknownBackendError
from convnext_kernels.tuning import cache

AUTO = "auto"
ENVIRONMENT_VARIABLE = "CONVNEXT_KERNELS_BACKEND"
# CPython's dictionary behind os.environ: a variable that is not set takes 0.05 us to look up there, and 0.8 in
# os.environ, which catches an exception.
_environ, _KEY = getattr(os.environ, "_data", None), os.environ.encodekey(ENVIRONMENT_VARIABLE)

_log = logging.getLogger("convnext_kernels")
_ambient: ContextVar[str | None] = ContextVar("convnext_kernels_backend", default=None)
calls.SETTINGS += [
    *tuning.SETTINGS,
    _ambient.get,
    functools.partial(os.environ.get, ENVIRONMENT_VARIABLE)
    if _environ is None
    else functools.partial(_environ.get, _KEY),
]


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine."""

    name: str
    available: bool
    reason: str  # why it is not available; empty when it is
    description: str


def list_backends() -> dict[str, BackendStatus]:
    """Return every backend of the package with its status on this machine, in the order that "auto" tries them."""
    status = {}
    for name in _backends.NAMES:
        backend = _backends.get(name)
        reason = backend.unavailable() or ""
        status[name] = BackendStatus(name, not reason, reason, backend.describe())
    return status


def compiled_for_cuda() -> dict[str, object]:
    """What the compiled CUDA extension contains and whether the driver can run it (`backends.cuda.compiled`)."""
    return _backends.get("cuda").compiled()


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU backend's instruction set has products of bf16 (`backends.cpu.multiplies_bf16`)."""
    return _backends.get("cpu").multiplies_bf16()


def cpu_extension() -> ModuleType | None:
    """The compiled extension of the CPU backend, or None."""
    backend = _backends.get("cpu")
    return None if backend.unavailable() else backend.extension()


def check_name(name: object, source: str) -> str:
    """Return `name` if it is "auto" or the name of a backend; the error begins with `source`, where it came from.

    Raises TypeError for anything but a string and UnknownBackendError for any other string.
    """
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected the name of a backend (str), got {type(name).__name__}")
    if name != AUTO and name not in _backends.NAMES:
        known = ", ".join((AUTO, *_backends.NAMES))
        raise UnknownBackendError(f"{source}: unknown backend {name!r}, expected one of {known}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Request backend `name` inside a ``with`` block, for every call that leaves ``backend="auto"``.

    The setting belongs to the current thread (it is a `contextvars.ContextVar`). Gradients are computed
    with the backend that was requested when the forward pass ran.

    Raises BackendError if no backend has that name or it cannot run on this machine.
    """
    check_name(name, "use_backend")
    if name != AUTO and (reason := _backends.get(name).unavailable()):
        raise BackendError(f"backend {name!r} is not available: {reason}")
    token = _ambient.set(name)
    try:
        yield
    finally:
        _ambient.reset(token)


def requested_backend(backend: str = AUTO) -> str:
    """Resolve ``backend=`` against `use_backend` and the environment; the result may still be "auto"."""
    if backend != AUTO:
        return check_name(backend, "backend")
    ambient = _ambient.get()
    if ambient is not None:
        return ambient
    if _environ is not None and _KEY not in _environ:
        return AUTO
    return check_name(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)


@functools.cache
def _log_skipped(name: str, reason: str) -> None:
    """Log once per reason that "auto" does not take a backend made for this device."""
    _log.warning("backend %r is skipped: %s", name, reason)


def _unproven(name: str, device: str) -> bool:
    """Whether nobody has run backend `name` on this kind of device: Triton's kernels on AMD's GPUs."""
    return name == "triton" and device == "cuda" and torch.version.hip is not None


def _trial(name: str, spec: OpSpec) -> str | None:
    """Why an unproven backend must not serve the call, after one small call of this kind; None if it may."""
    device = torch.device(spec.device, torch.cuda.current_device() if spec.device == "cuda" else None)
    return trial.refusal(name, spec, device) or _log_unproven(name)


@functools.cache
def _log_unproven(name: str) -> None:
    """Log once that a backend passed."""
    _log.warning(
        "backend %r: its kernels agree with PyTorch on this device, where nobody has timed them; they may be slower "
        'than backend="eager"',
        name,
    )


@functools.lru_cache(maxsize=4096)
def _able(spec: OpSpec, requested: str) -> tuple[str, ...]:
    """The backends that can serve a call, in order of preference. Raises BackendError if there is none."""
    able, refusals = [], []
    for name in _backends.NAMES if requested == AUTO else (requested,):
        backend = _backends.get(name)
        if requested == AUTO and backend.DEVICES is not None and spec.device not in backend.DEVICES:
            continue
        reason = backend.unavailable() or backend.refuses(spec)
        if not reason and _unproven(name, spec.device):
            reason = _trial(name, spec)
        if not reason:
            able.append(name)
            continue
        refusals.append(f"{name}: {reason}")
        if requested == AUTO and not able:
            _log_skipped(name, reason)
    if not able:
        raise BackendError(f"no backend can serve {spec.op}: " + "; ".join(refusals))
    return tuple(able)


def machine(device: str) -> tuning.Gpu | str:
    """What timed choices for tensors on `device`, a device type, are kept for: the current GPU, or the CPU."""
    return _gpu(torch.cuda.current_device()) if device == "cuda" else _backends.get("cpu").machine()


@functools.cache
def _gpu(index: int) -> tuning.Gpu:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        return tuning.for_device(name, torch.cuda.get_device_properties(index).gcnArchName)
    major, minor = torch.cuda.get_device_capability(index)
    return tuning.for_device(name, 10 * major + minor)


def state(requested: str) -> object:
    """What `choose` depends on beside the call: a key for what it has chosen; None if that must not be remembered."""
    if requested != AUTO:
        return requested
    if tuning.forcing():
        return None
    generation = cache.generation()
    return (generation, torch.get_num_threads()) if generation else requested


# With at most so many channels, reading the hidden back costs more time than computing it again: on a GPU (predicted,
# docs/training.md), and with a CPU's tiles (AMX, bf16, batch 8, one thread: forward and backward of C 96 to 384 are
# 1.06 to 1.18 times as fast, C 768 0.94 to 1.05 times). Other CPUs gain by keeping it: training steps of 96 and 192
# channels are 1.03 to 1.10 times faster (`convnext-kernels bench --only 'block/*step'`).
RECOMPUTED_CHANNELS = 192
RECOMPUTED_CHANNELS_TILES = 384


def _recomputes(spec: OpSpec) -> bool:
    if spec.device != "cpu":
        return spec.channels <= RECOMPUTED_CHANNELS
    tiles = spec.compute_dtype is torch.bfloat16 and _backends.get("cpu").has_tiles()
    return tiles and spec.channels <= RECOMPUTED_CHANNELS_TILES


def keeps(spec: OpSpec, memory: str, backend: str = AUTO) -> str:
    """What a forward pass of `mlp` or `block` keeps for its gradient: "nothing", "min" or "balanced".

    `memory` may also be "auto". Backends whose gradients recompute everything from the inputs keep nothing.
    """
    if memory == "nothing":
        return memory
    # Under torch.compile with dynamic shapes these are symbols; what is kept depends on their values.
    height, width = spec.kernel_size
    spec = spec._replace(channels=int(spec.channels), kernel_size=(int(height), int(width)), hidden=int(spec.hidden))
    # Not the backend that was timed to be the fastest: a compiled graph relies on the number of tensors that are kept.
    if not choose(spec, backend).KEEPS_HIDDEN:
        return "nothing"
    if memory == "auto":
        return "min" if _recomputes(spec) else "balanced"
    return memory


def rounds(spec: OpSpec, backend: str = AUTO) -> bool:
    """Whether a forward pass of `block` keeps what its gradient needs in the dtype of the matmuls, not in x's.

    Under autocast with an fp32 x, if the backend's ``KEEPS_ROUNDED`` says so. Not the backend that was timed to be the
    fastest, as in `keeps`.
    """
    if spec.compute_dtype.itemsize >= spec.dtype.itemsize:
        return False
    height, width = spec.kernel_size
    spec = spec._replace(channels=int(spec.channels), kernel_size=(int(height), int(width)), hidden=int(spec.hidden))
    return choose(spec, backend).KEEPS_ROUNDED


def _layout(x: Tensor) -> str:
    if x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d):
        return "channels_last"
    return "contiguous" if x.is_contiguous() else "strided"


def choose(spec: OpSpec, backend: str = AUTO, x: Tensor | None = None, *details: Any) -> ModuleType:
    """Return the module that serves `spec`: ``backends.<name>.<op>``.

    With x, an image or a volume, and `details`, what else the time of the call depends on, "auto" takes a timed choice
    if there is one. Raises BackendError, with the reason, when no backend can serve the call or the requested one
    cannot.
    """
    requested = requested_backend(backend)
    able = _able(spec, requested)
    name = able[0]
    if requested == AUTO and len(able) > 1 and x is not None and x.dim() in (4, 5):
        details = tuple("".join("01"[d] for d in detail) if isinstance(detail, list) else detail for detail in details)
        problem = (*x.shape, _layout(x), *spec[2:4], *spec.kernel_size, *spec.dilation, *spec[7:10], *details)
        kernel = f"{spec.op} backward" if spec.backward else spec.op
        name = tuning.pick(kernel, problem, [tuning.Candidate(n, {}) for n in able], machine(spec.device)).name
    return _backends.op_module(name, spec.op)
