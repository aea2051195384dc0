"""Conversion to and from dense NHWC, which the kernels read and write; NDHWC for tensors with five dimensions."""

import math

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def dense_nhwc(x: Tensor) -> Tensor:
    """Return x if its memory is dense NHWC, else a copy that is."""
    memory_format = _FORMATS[x.dim()]
    if x.is_contiguous(memory_format=memory_format):
        return x
    if not x.is_contiguous():
        return x.contiguous(memory_format=memory_format)
    copy = torch.empty_like(x, memory_format=memory_format)
    n, channels, *sizes = x.shape
    _transpose(x, copy, n, channels, math.prod(sizes))
    return copy


def pixels_of(x: Tensor) -> tuple[Tensor, int]:
    """Return x and the elements from pixel to pixel if its memory is NHWC, dense or some channels of wider pixels.

    Otherwise a dense copy of it. The channels that `torch.split` gives of a channels_last tensor are not copied.
    """
    shape, strides = x.shape, x.stride()
    pixel = step = strides[-1]
    if shape[-1] > 1 and shape[1] > 1 and strides[1] == 1 and pixel > shape[1]:
        for size, stride in zip(shape[:1:-1], strides[:1:-1], strict=True):
            if stride != step and size != 1:
                break
            step *= size
        else:
            if strides[0] == step or shape[0] == 1:
                return x, pixel
    return dense_nhwc(x), shape[1]


def _transpose(source: Tensor, target: Tensor, batch: int, rows: int, columns: int) -> None:
    threads = native.threads(source.numel() * 4)
    native.extension().transpose(address(source), address(target), batch, rows, columns, source.element_size(), threads)


def output_for(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (what the kernel writes, what the op returns); they differ when x is not NHWC."""
    out = torch.empty_like(x)
    return written_for(out), out


def written_for(out: Tensor) -> Tensor:
    """What the kernel writes for the empty tensor `out`, which the op returns: `out` itself if it is NHWC."""
    memory_format = _FORMATS[out.dim()]
    if out.is_contiguous(memory_format=memory_format):
        return out
    return torch.empty_like(out, memory_format=memory_format)


def finish(written: Tensor, out: Tensor) -> Tensor:
    """Copy the kernel's result to the layout that the op promises, if they differ."""
    if written is out:
        return out
    if not out.is_contiguous():
        return out.copy_(written)
    n, channels, *sizes = out.shape
    _transpose(written, out, n, math.prod(sizes), channels)
    return out


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Give a dense gradient the parameter's shape, dtype and strides."""
    gradient = gradient.reshape(parameter.shape)
    if parameter.dtype == gradient.dtype and parameter.stride() == gradient.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def flat_float(t: Tensor | None) -> Tensor | None:
    """Return a parameter as a dense fp32 vector."""
    return None if t is None else t.detach().to(torch.float32).contiguous().flatten()


def address(t: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if t is None else t.data_ptr()
