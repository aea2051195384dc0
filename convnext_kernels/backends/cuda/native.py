"""The compiled CUDA extension: whether it can be imported, and tensors as the plain numbers that it takes."""

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from convnext_kernels.backends.gpu.layout import Rows
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


def context(x: Tensor) -> tuple[int, int]:
    """Where to launch: x's device and PyTorch's current stream on it."""
    if x.device.type != "cuda":
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def info(x: Tensor) -> dict[str, int]:
    """Arch (10 * major + minor), multiprocessors and shared_bytes of x's GPU."""
    return extension().device_info(x.device.index or 0)


def address(t: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if t is None else t.data_ptr()


# The tuples below end with the tensor, so that a temporary tensor lives until the call returns.


def vector(t: Tensor | None) -> tuple | None:
    """A parameter: a dense tensor of any shape, in its own dtype."""
    if t is None:
        return None
    assert t.is_contiguous()
    return address(t), DTYPE_CODES[t.dtype], t


def rows(r: Rows | None) -> tuple | None:
    """(N, C, H, W) as samples x pixels x channels."""
    if r is None:
        return None
    return address(r.tensor), DTYPE_CODES[r.tensor.dtype], r.stride_n, r.stride_p, r.stride_c, r.tensor


def image(t: Tensor | None) -> tuple | None:
    """(N, C, H, W) with its strides."""
    return None if t is None else (address(t), DTYPE_CODES[t.dtype], *t.stride(), t)
