"""How kernels address tensors, NHWC as well as NCHW: as N samples x HW pixels x C channels with three strides.

Element (n, p, c) is at n * stride_n + p * stride_p + c * stride_c. channels_last has stride_c = 1, contiguous has
stride_p = 1. Triton compiles a stride of 1 into the kernel, so the loads are coalesced in both layouts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """An (N, C, H, W) tensor as a kernel addresses it."""

    tensor: Tensor
    stride_n: int
    stride_p: int
    stride_c: int


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of samples, pixels and channels, or None if H and W cannot be merged into one dimension."""
    samples, channels, height, width = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if height > 1 and width > 1 and stride_h != width * stride_w:
        return None
    # The stride of a dimension of size 1 is arbitrary in PyTorch. It is replaced by that of a dense tensor, so that no
    # other kernel is compiled because of it, and so that samples without a gap between them are recognised.
    if channels == 1:
        stride_c = 1
    stride_p = stride_w if width > 1 else stride_h
    if height * width == 1:
        stride_p = channels if stride_c == 1 else 1
    if samples == 1:
        stride_n = max(height * width * stride_p, channels * stride_c)
    return stride_n, stride_p, stride_c


def rows(x: Tensor) -> Rows:
    """View (N, C, H, W) as N samples x HW pixels x C.

    No copy is made if H and W can be merged into one dimension (channels_last, contiguous, slices of samples or
    channels, expanded tensors). Anything else (an image rotated by 90 degrees, a crop) is copied to channels_last.
    """
    strides = _strides(x)
    if strides is None:
        x = x.contiguous(memory_format=torch.channels_last)
        strides = _strides(x)
        assert strides is not None
    return Rows(x, *strides)


def extent(x: Rows, *others: Rows, merge: bool = True) -> tuple[int, int]:
    """Return (samples, pixels per sample) of (N, C, H, W) x. With `merge`, and if no tensor has a gap between its
    samples, that is one sample with all pixels.
    """
    samples, _, height, width = x.tensor.shape
    pixels = height * width
    if merge and all(r.stride_n == pixels * r.stride_p for r in (x, *others)):
        return 1, samples * pixels
    return samples, pixels


def patch_rows(x: Tensor, patch: int, dtype: torch.dtype) -> Rows:
    """Allocate rows (N * H//K * W//K * K * K, C) for x's pixels in the order of K x K patches, without those outside.

    LayerNorm kernels write and read them with ``patch=K``.
    """
    samples, channels, height, width = x.shape
    held = (height // patch) * (width // patch) * patch * patch
    out = torch.empty((samples * held, channels), dtype=dtype, device=x.device)
    return Rows(out, held * channels, channels, 1)


def output_rows(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Rows]:
    """Return (the op's result, like `torch.empty_like(x)`, and the rows that the kernel writes); then call `finish`."""
    out = torch.empty_like(x, dtype=dtype)
    strides = _strides(out)
    if strides is not None:
        return out, Rows(out, *strides)
    return out, rows(torch.empty_like(out, memory_format=torch.channels_last))


def finish(out: Tensor, written: Rows) -> Tensor:
    """Return `out`, after copying what the kernel wrote to it unless the kernel wrote to `out` itself."""
    return out if written.tensor is out else out.copy_(written.tensor)


def like(result: Tensor, x: Tensor) -> Tensor:
    """Return `result` with the dtype and strides of `torch.empty_like(x)`, which the fake kernels promise."""
    out = torch.empty_like(x)
    if result.dtype == out.dtype and result.stride() == out.stride():
        return result
    return out.copy_(result)


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Give a parameter's gradient the parameter's shape, dtype and strides."""
    return like(gradient.reshape(parameter.shape), parameter)


def flat(parameter: Tensor) -> Tensor:
    """A parameter as a dense vector of its own dtype; without a copy if the parameter is dense."""
    return parameter.detach().reshape(-1).contiguous()


def vector(parameter: Tensor | None) -> Tensor | None:
    """`flat`, of a parameter that may be missing."""
    return None if parameter is None else flat(parameter)
