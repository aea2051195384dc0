"""Two repairs of Triton's interpreter (3.7 to 3.9), which runs kernels as NumPy on the CPU; GPUs are not concerned.

It keeps bf16 as 16-bit integers. Rounding fp32 to bf16 cuts bits off instead of rounding to nearest, three times the
error of a GPU and NaN may become infinite; `tl.dot` multiplies the integers. Both are done here as a GPU does them.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_cast, _dot = _Builder.cast_impl, _Builder.create_dot


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


def repair() -> None:
    """Put both repairs into Triton's interpreter."""
    _Builder.cast_impl = _cast_impl
    _Builder.create_dot = _create_dot
