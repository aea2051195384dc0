"""The compiled CUDA extension: whether it can be imported, what its functions take, prepared calls."""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import torch_versions
from convnext_kernels.backends.gpu import prepared as programs
from convnext_kernels.backends.gpu.layout import Rows, flat
from convnext_kernels.backends.gpu.prepared import View
from convnext_kernels.spec import BackendError

# For tests: the file of another build of the extension, such as the one whose kernels run on the CPU.
EXTENSION_VARIABLE = "CONVNEXT_KERNELS_CUDA_EXTENSION"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUILD_HINT = "to build them, install this package again with CNK_CUDA=1 and nvcc on PATH"


@functools.cache
def _load() -> ModuleType | str:
    path = os.environ.get(EXTENSION_VARIABLE)
    try:
        if not path:
            return importlib.import_module("convnext_kernels._native_cuda")
        name = os.path.basename(path).partition(".")[0]
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            return f"{EXTENSION_VARIABLE}={path}: expected the file of a Python extension"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    except ModuleNotFoundError:
        return f"this installation was built without the CUDA kernels ({BUILD_HINT})"
    except ImportError as error:
        return f"the compiled CUDA extension cannot be imported ({error})"
    return module


def missing() -> str | None:
    """Why the extension cannot be imported, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def extension() -> ModuleType:
    """Return the compiled extension. Raises BackendError if it cannot be imported."""
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(f"backend 'cuda' is not available: {loaded}")
    return loaded


def on_host() -> bool:
    """Whether the extension is the test build whose kernels run on the CPU."""
    return not missing() and extension().HOST


def device_type() -> str:
    """Device type of the tensors that the kernels take."""
    return "cpu" if on_host() else "cuda"


# RMSNorm's and SimpleNorm's kernels hold a pixel in the registers of a block (csrc/cuda/layernorm/layernorm_rows.h).
NORM_ROW_BYTES = 256 * 3 * 16


@functools.cache
def norm_code(name: str) -> int:
    """The extension's number for a norm of `variants`."""
    return extension().NORMS.index(name)


@functools.cache
def activation_code(name: str) -> int:
    """The extension's number for an activation of `variants`."""
    return extension().ACTIVATIONS.index(name)


def _device(x: Tensor) -> torch.device:
    """Where a launcher's tensors are, also while it is recorded on "meta"."""
    recorder = programs.recorder()
    return x.device if recorder is None else recorder.device


def context(x: Tensor) -> tuple[int, int]:
    """Where to launch: x's device and PyTorch's current stream on it."""
    device = _device(x)
    if device.type != "cuda":
        return 0, 0
    return device.index, torch_versions.current_stream(device.index)


def info(x: Tensor) -> dict[str, int]:
    """Arch (10 * major + minor), multiprocessors and shared_bytes of x's GPU."""
    return extension().device_info(_device(x).index or 0)


def index(x: Tensor) -> int | None:
    """The index of x's GPU, None for the kernels that run on the CPU."""
    return _device(x).index


def kernels() -> Any:
    """The functions of the extension that launch; while a launcher is recorded, functions that record their calls.

    The first argument of each is the `context`.
    """
    recorder = programs.recorder()
    return extension() if recorder is None else _Recording(recorder)


class _Recording:
    def __init__(self, recorder: programs.Recorder) -> None:
        self.recorder = recorder

    def __getattr__(self, name: str) -> Callable:
        function = getattr(extension(), name)
        return lambda _context, *arguments: self.recorder.steps.append(_Call(function, arguments))


class _Call:
    """A call of the extension as a step of a program."""

    def __init__(self, function: Callable, arguments: Sequence[Any]) -> None:
        self.launcher, self.arguments = function, arguments
        parts = [part for a in arguments for part in (a if isinstance(a, tuple) and type(a) is not View else (a,))]
        self.slots = tuple(part.slot for part in parts if type(part) is View)

    def run(self, _buffers: list, addresses: list[int], context: tuple[int, int]) -> None:
        def value(a: Any) -> Any:
            if type(a) is View:
                return addresses[a.slot] + a.offset * a.itemsize
            return tuple(map(value, a)) if type(a) is tuple else a

        self.launcher(context, *map(value, self.arguments))

    def write(self, code: programs.Code) -> None:
        def expression(a: Any) -> str:
            if type(a) is View:
                return f"a{a.slot} + {a.offset * a.itemsize}"
            if type(a) is tuple:  # without the tensor at its end
                return f"({', '.join(expression(part) for part in a if not isinstance(part, Tensor))},)"
            return code.constant(a)

        code.lines.append(f"{code.constant(self.launcher)}(stream, {', '.join(map(expression, self.arguments))})")


prepared = programs.preparing(lambda tensor: ((), context(tensor)))


def address(t: Tensor | None) -> int | View:
    """The address of a tensor's first element; 0 for None."""
    recorder = programs.recorder()
    if t is None:
        return 0
    return t.data_ptr() if recorder is None else recorder.view(t)


# The tuples below end with the tensor, so that a temporary tensor lives until the call returns.


def vector(t: Tensor | None) -> tuple | None:
    """A parameter of any shape, in its own dtype."""
    if t is None:
        return None
    t = flat(t)
    return address(t), DTYPE_CODES[t.dtype], t


def rows(r: Rows | None) -> tuple | None:
    """(N, C, H, W) as samples x pixels x channels."""
    if r is None:
        return None
    return address(r.tensor), DTYPE_CODES[r.tensor.dtype], r.stride_n, r.stride_p, r.stride_c, r.tensor


def image(t: Tensor | None) -> tuple | None:
    """(N, C, H, W) with its strides."""
    return None if t is None else (address(t), DTYPE_CODES[t.dtype], *t.stride(), t)
