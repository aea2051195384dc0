"""How kernels see tensors: N samples x HW pixels x C channels with three strides, NHWC and NCHW alike.

Kernels address element (n, p, c) as n * stride_n + p * stride_p + c * stride_c. channels_last has stride_c = 1,
contiguous has stride_p = 1; Triton compiles a 1 into the kernel, so each gets its own coalesced loads.
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
    """Strides of samples, pixels and channels, or None when H and W do not step as one dimension."""
    samples, channels, height, width = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if height > 1 and width > 1 and stride_h != width * stride_w:
        return None
    # The stride of a dimension of size 1 is arbitrary in PyTorch: put in what a dense tensor has, so that it neither
    # changes how a kernel is compiled nor hides that samples follow each other without a gap.
    if channels == 1:
        stride_c = 1
    stride_p = stride_w if width > 1 else stride_h
    if height * width == 1:
        stride_p = channels if stride_c == 1 else 1
    if samples == 1:
        stride_n = max(height * width * stride_p, channels * stride_c)
    return stride_n, stride_p, stride_c


def rows(x: Tensor) -> Rows:
    """See (N, C, H, W) as N samples x HW pixels x C.

    Without a copy when H and W step as one dimension (channels_last, contiguous, slices of samples or channels,
    expanded tensors); anything else (an image turned by 90 degrees, a crop) is copied to channels_last.
    """
    strides = _strides(x)
    if strides is None:
        x = x.contiguous(memory_format=torch.channels_last)
        strides = _strides(x)
        assert strides is not None
    return Rows(x, *strides)


def extent(x: Rows, *others: Rows, merge: bool = True) -> tuple[int, int]:
    """Return (samples, pixels of one) of (N, C, H, W) x; if all have their samples one after the other without a gap,
    and `merge`, then one long sample.
    """
    samples, _, height, width = x.tensor.shape
    pixels = height * width
    if merge and all(r.stride_n == pixels * r.stride_p for r in (x, *others)):
        return 1, samples * pixels
    return samples, pixels


def patch_rows(x: Tensor, patch: int, dtype: torch.dtype) -> Rows:
    """Allocate rows (N * H//K * W//K * K * K, C): x's pixels in the order of K x K patches, those in no patch left out.

    What LayerNorm kernels write and read with ``patch=K``.
    """
    samples, channels, height, width = x.shape
    held = (height // patch) * (width // patch) * patch * patch
    out = torch.empty((samples * held, channels), dtype=dtype, device=x.device)
    return Rows(out, held * channels, channels, 1)


def output_rows(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Rows]:
    """Return (what the op promises: `torch.empty_like(x)`, what the kernel writes); `finish` joins them."""
    out = torch.empty_like(x, dtype=dtype)
    strides = _strides(out)
    if strides is not None:
        return out, Rows(out, *strides)
    return out, rows(torch.empty_like(out, memory_format=torch.channels_last))


def finish(out: Tensor, written: Rows) -> Tensor:
    """Bring what the kernel wrote into the strides the op promised."""
    return out if written.tensor is out else out.copy_(written.tensor)


def like(result: Tensor, x: Tensor) -> Tensor:
    """Return `result` with the dtype and strides `torch.empty_like(x)` has, which the fake kernels promise."""
    out = torch.empty_like(x)
    if result.dtype == out.dtype and result.stride() == out.stride():
        return result
    return out.copy_(result)


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Give a parameter's gradient the parameter's shape, dtype and strides."""
    return like(gradient.reshape(parameter.shape), parameter)


def flat(parameter: Tensor) -> Tensor:
    """A parameter as a dense vector of its own dtype; no copy for any shape that is dense."""
    return parameter.detach().reshape(-1).contiguous()
