"""Downsampling between stages: LayerNorm over the channels, then a KxK convolution with stride K, no padding.

x (N, C, H, W), weight (D, C, K, K), bias (D,) or None; the result is (N, D, H // K, W // K) in x's memory format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.eager import layernorm
from convnext_kernels.backends.eager.layout import like, like_parameter


def _whole_patches(n: Tensor, side: int) -> Tensor:
    """Cut off the rows and columns that fill no patch.

    The convolution would ignore them, but oneDNN's 16-bit kernels return garbage for stride 3 with such a rest
    (https://github.com/pytorch/pytorch/issues/169688).
    """
    return n[..., : n.shape[2] // side * side, : n.shape[3] // side * side]


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    compute_dtype: torch.dtype,
    out: Tensor,
) -> Tensor:
    """Normalise, then convolve in `compute_dtype`; `out` says dtype and strides."""
    n = layernorm.forward(x, norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    bias = None if bias is None else bias.to(compute_dtype)
    side = weight.shape[-1]
    y = F.conv2d(_whole_patches(n, side).to(compute_dtype), weight.to(compute_dtype), bias, stride=side)
    return like(y, out)


def backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of (x, norm_weight, norm_bias, weight, bias) that `needs` marks, in that order."""
    norm_weight_x, norm_bias_x = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    n = layernorm.forward(x, norm_weight_x, norm_bias_x, eps)
    side = weight.shape[-1]
    dn, dw, db = torch.ops.aten.convolution_backward(
        dy.to(compute_dtype),
        _whole_patches(n, side).to(compute_dtype),
        weight.to(compute_dtype),
        [weight.shape[0]],
        [side, side],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [any(needs[:3]), needs[3], needs[4]],
    )
    gradients = []
    if any(needs[:3]):
        dn = F.pad(dn, (0, x.shape[3] - dn.shape[3], 0, x.shape[2] - dn.shape[2]))
        gradients = layernorm.backward(dn.to(x.dtype), x, norm_weight_x, norm_bias_x, eps, needs[:3])
        names = [p for p, needed in zip((x, norm_weight, norm_bias), needs[:3], strict=True) if needed]
        gradients = [like_parameter(g, p) for g, p in zip(gradients, names, strict=True)]
    if needs[3]:
        gradients.append(like_parameter(dw, weight))
    if needs[4]:
        gradients.append(like_parameter(db, bias))
    return gradients
