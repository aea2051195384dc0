"""Downsampling between stages: a norm over the channels, then a KxK convolution with stride K, no padding.

x (N, C, H, W), weight (D, C, K, K), bias (D,) or None; the result is (N, D, H // K, W // K) in x's memory format.

The convolution is a matmul over the patches. F.conv2d is not used, because oneDNN's 16-bit kernels return wrong results
for strides 3 and 4 (torch 2.14 on a machine with AMX; https://github.com/pytorch/pytorch/issues/169688).
"""

import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.eager import layernorm
from convnext_kernels.backends.eager.layout import like, like_parameter, nchw, nhwc
from convnext_kernels.calls import DownsampleCall, NormCall


def _patches(n: Tensor, side: int) -> Tensor:
    """Turn (N, C, H, W) into rows (N, H // K, W // K, C K K); pixels that fill no whole patch are left out."""
    samples, channels, height, width = n.shape
    rows, columns = height // side, width // side
    n = n[..., : rows * side, : columns * side].reshape(samples, channels, rows, side, columns, side)
    return n.permute(0, 2, 4, 1, 3, 5).reshape(samples, rows, columns, -1)


def _unpatch(patches: Tensor, side: int, x: Tensor) -> Tensor:
    """Undo `_patches`: a tensor of x's shape with zeros outside of the patches."""
    samples, rows, columns, _ = patches.shape
    n = patches.reshape(samples, rows, columns, x.shape[1], side, side).permute(0, 3, 1, 4, 2, 5)
    n = n.reshape(samples, x.shape[1], rows * side, columns * side)
    return F.pad(n, (0, x.shape[3] - columns * side, 0, x.shape[2] - rows * side))


def _norm(call: DownsampleCall) -> NormCall:
    x, weight, bias = call.x, call.norm_weight, call.norm_bias
    return NormCall(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), call.eps, call.norm)


def forward(call: DownsampleCall) -> Tensor:
    """Normalise, then convolve in `compute_dtype`."""
    weight, bias, compute_dtype = call.weight, call.bias, call.compute_dtype
    n = layernorm.forward(_norm(call))
    bias = None if bias is None else bias.to(compute_dtype)
    y = F.linear(_patches(n.to(compute_dtype), weight.shape[-1]), weight.flatten(1).to(compute_dtype), bias)
    return like(nchw(y), call.result())


def backward(dy: Tensor, call: DownsampleCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, norm_weight, norm_bias, weight, bias) that `needs` marks, in that order."""
    x, norm_weight, norm_bias, weight, bias, _, _, compute_dtype, _ = call
    norm = _norm(call)
    n = layernorm.forward(norm)
    side = weight.shape[-1]
    patches = _patches(n.to(compute_dtype), side)
    dy_rows = nhwc(dy).to(compute_dtype).reshape(-1, weight.shape[0])
    gradients = []
    if any(needs[:3]):
        dpatches = (dy_rows @ weight.flatten(1).to(compute_dtype)).reshape(patches.shape)
        dn = _unpatch(dpatches, side, x).to(x.dtype)
        gradients = layernorm.backward(dn, norm, needs[:3])
        names = [p for p, needed in zip((x, norm_weight, norm_bias), needs[:3], strict=True) if needed]
        gradients = [like_parameter(g, p) for g, p in zip(gradients, names, strict=True)]
    if needs[3]:
        gradients.append(like_parameter(dy_rows.mT @ patches.flatten(0, 2), weight))
    if needs[4]:
        gradients.append(like_parameter(dy_rows.sum(dim=0), bias))
    return gradients
