"""Patches of Triton's interpreter (3.4 to 3.9), which runs kernels with NumPy on the CPU. They do not affect GPUs.

- It stores bf16 as 16-bit integers. From fp32 to bf16 it truncates instead of rounding to nearest, with three times a
  GPU's error, and NaN may become infinite; `tl.dot` multiplies the integers. With the patches both work as on a GPU.
- Every call of a device function searches triton.language for functions to replace. That takes 2 ms, half the time of a
  kernel, and the launch has already replaced them all. With the patches only launches search.
- Every integer operation is done twice to detect overflow, a third of the remaining time. The tests that run here have
  tensors that are far too small for an overflow, so the patches turn it off.
- It stores the running program's position in one place for the whole process. The patches let launches of other threads
  wait.
- Up to Triton 3.6 a scalar is an array of one element, which NumPy from 2.4 on does not convert to an index.
- NumPy warns about inf - inf, a GPU does not. The patches turn the warnings off.
"""

import threading
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core  # noqa: F401  launches look for `core` and `tl` here and replace their functions
from triton.runtime import interpreter

_one_at_a_time = threading.RLock()
_Builder = interpreter.InterpreterBuilder
_cast, _dot = _Builder.cast_impl, _Builder.create_dot
_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    pair = (src.dtype.scalar, dst_type.scalar)
    if pair == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_widen(src.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_round(src.data), tl.bfloat16)
    return _cast(self, src, dst_type)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widen(handle.data), tl.float32)

    return _dot(self, wide(a), wide(b), d, *rest)


def _here() -> None:
    """A function with this module's globals, `tl` and `core`."""


def _patch(_: Any) -> Any:
    scope = _patch_lang(_here)
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    return scope


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _launch_quietly(self: Any, *args: Any, **kwargs: Any) -> None:
    with _one_at_a_time, np.errstate(all="ignore"):
        _launch(self, *args, **kwargs)


def repair() -> None:
    """Patch Triton's interpreter."""
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    interpreter._patch_lang = _patch
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.GridExecutor.__call__ = _launch_quietly
    _Builder.cast_impl = _cast_impl
    _Builder.create_dot = _create_dot
