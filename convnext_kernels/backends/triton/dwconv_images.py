"""How the depthwise launchers address tensors: images, volumes and weights, without a copy if possible."""

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from convnext_kernels import exporting
from convnext_kernels.backends.gpu.prepared import aligned

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Image(NamedTuple):
    """A tensor as the kernels address it."""

    tensor: Tensor
    stride_n: int
    strides: tuple[int, ...]  # of c, [d,] h, w
    channels_first: bool


def viewed(x: Tensor) -> Image | None:
    """View x without a copy; None unless its samples are dense NHWC or NCHW (volumes: NDHWC or NCDHW)."""
    n, c, *sizes = x.shape
    stride_n, *strides = x.stride()
    if n == 1:
        stride_n = c * math.prod(sizes)
    inner = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]  # pixels from one to the next of each axis
    nhwc, nchw = (1, *(pixels * c for pixels in inner)), (math.prod(sizes), *inner)
    for dense in (nhwc, nchw):
        # The stride of a dimension of size 1 is arbitrary
        if all(a == b or size == 1 for a, b, size in zip(strides, dense, (c, *sizes), strict=True)):
            return Image(x, stride_n, dense, dense is nchw)
    return None


def channels_last(x: Tensor) -> torch.memory_format:
    """NHWC of an image, NDHWC of a volume."""
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def sides(t: Tensor) -> tuple[int, ...]:
    """Depth, height and width of an image, a volume or a weight; an image's depth is 1."""
    return t.shape[2:] if t.dim() == 5 else (1, *t.shape[2:])


def as_image(x: Tensor, like: Image | None = None) -> Image:
    """View x without a copy if possible, else a channels_last copy of it; in the memory format of `like`."""
    seen = viewed(x)
    if seen is None or (like is not None and seen.channels_first != like.channels_first):
        first = like is not None and like.channels_first
        seen = viewed(x.contiguous(memory_format=torch.contiguous_format if first else channels_last(x)))
    assert seen is not None
    return seen


def in_twos(image: Image) -> bool:
    """Whether neighbouring channels can be loaded in pairs."""
    if image.channels_first or exporting.traces_launches():  # there addresses are not known
        return False
    return image.stride_n % 2 == 0 and aligned(image.tensor, 2 * image.tensor.element_size())


def filled(target: Image, out: Tensor) -> Tensor:
    """`out`, filled from `target` if that is another tensor."""
    return out if target.tensor is out else out.copy_(target.tensor)


def rounding(dtype: torch.dtype, compute_dtype: torch.dtype) -> tl.dtype | None:
    """The dtype to round values of `dtype` to before they are multiplied; None: no rounding."""
    return None if compute_dtype in (dtype, torch.float32) else _TRITON_DTYPES[compute_dtype]


def as_rows(weight: Tensor) -> Tensor:
    """A weight with all its kernel rows, of every plane, in one dimension: (C, 1, KD * KH, KW)."""
    return weight.flatten(2, 3) if weight.dim() == 5 else weight


def weight_strides(weight: Tensor) -> tuple[int, int, int]:
    """From channel to channel, row to row and tap to tap."""
    return weight.stride(0), weight.stride(2), weight.stride(3)
