"""What the compositions of ops from PyTorch's operators share (`registration.composed`).

Exporters trace them. So they leave nothing that would do nothing in the traced program: no view to the same shape, no
cast to the same dtype, no copy for the sake of strides. Sizes of parameters are constants: `int`, because
`torch.jit.trace` has tensors for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.variants import LAYER, scaled


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `t` in `dtype`."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a parameter of any shape as a vector in `dtype`."""
    return cast(t if t is None or t.dim() == 1 else t.flatten(), dtype)


def matrix(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of a Linear or of a 1x1 convolution as a matrix in `dtype`."""
    return cast(t if t.dim() == 2 else t.flatten(1), dtype)


def nhwc(x: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    """View (N, H, W, C) as (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str = LAYER) -> Tensor:
    """LayerNorm, or another norm, of (..., C) over the last dimension.

    Weight and bias have any shape with C elements; or (N, C), each sample's of (N, H, W, C).
    """
    if norm != LAYER:
        return scaled(x, vector(weight, x.dtype), eps, norm)
    if weight.dim() == 2 and weight.shape[1] == x.shape[-1]:
        y = F.layer_norm(x, [int(weight.shape[1])], None, None, eps)
        weight, bias = (cast(t.view(-1, 1, 1, t.shape[1]), x.dtype) for t in (weight, bias))
        return torch.addcmul(bias, y, weight)
    channels = [int(weight.numel())]
    return F.layer_norm(x, channels, vector(weight, x.dtype), vector(bias, x.dtype), eps)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, ...], dtype: torch.dtype, stride: int = 1
) -> Tensor:
    """The depthwise convolution of (N, C, H, W) or (N, C, D, H, W) in `dtype`."""
    channels, _, *sides = map(int, weight.shape)
    padding = [d * (side - 1) // 2 for d, side in zip(dilation, sides, strict=True)]
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    convolve = F.conv2d if len(sides) == 2 else F.conv3d
    return convolve(cast(x, dtype), weight, bias, stride, padding, dilation, channels)


def response_normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GRN of (N, H, W, C); sums of squares of 16-bit values in fp32."""
    wide = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    norm = torch.linalg.vector_norm(cast(x, wide), dim=(1, 2), keepdim=True)
    response = cast(norm / (norm.mean(dim=-1, keepdim=True) + eps), x.dtype)
    return x + (vector(weight, x.dtype) * (x * response) + vector(bias, x.dtype))
