"""Downsampling between stages: a norm over the channels, then a KxK convolution with stride K, no padding.

The norm's kernel writes its rows in the order of the patches, so the convolution is one matmul,
(N HR WR, K K C) x (K K C, D), by cuBLAS. Bytes per input pixel with 16-bit elements, D = 2C and K = 2: LayerNorm
4C, matmul 2C + C. Backward: dpatches = dy W by cuBLAS, then LayerNorm's backward kernel, which reads in that order.
For the weight's gradient the patches are computed again. Downsampling has no kernel of its own.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.gpu.layout import Rows, like, like_parameter, patch_rows
from convnext_kernels.calls import DownsampleCall


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight (D, C, K, K) as (D, K K C): the order of channels_last."""
    matrix = weight.detach().permute(0, 2, 3, 1)
    if matrix.dtype != dtype or not matrix.is_contiguous():
        matrix = torch.empty(matrix.shape, dtype=dtype, device=matrix.device).copy_(matrix)
    return matrix.flatten(1)


def _patches(kernels: ModuleType, call: DownsampleCall) -> tuple[Tensor, Rows]:
    """Normalise; return the patches (N HR WR, K K C) and the same memory as rows of C."""
    x, side = call.x, call.weight.shape[-1]
    target = patch_rows(x, side, call.compute_dtype)
    kernels.layernorm.normalize(x, call.norm_weight, call.norm_bias, call.eps, target, patch=side, norm=call.norm)
    return target.tensor.view(-1, side * side * x.shape[1]), target


def forward(kernels: ModuleType, call: DownsampleCall) -> Tensor:
    """Normalise, then convolve in `compute_dtype`."""
    weight, bias, compute_dtype = call.weight, call.bias, call.compute_dtype
    patches, _ = _patches(kernels, call)
    bias = None if bias is None else bias.detach().to(compute_dtype).flatten()
    y = F.linear(patches, _matrix(weight, compute_dtype), bias)
    out = call.result()
    samples, features, height, width = out.shape
    return like(y.view(samples, height, width, features).permute(0, 3, 1, 2), out)


def backward(kernels: ModuleType, dy: Tensor, call: DownsampleCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, norm_weight, norm_bias, weight, bias) that `needs` marks, in that order."""
    x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype, _ = call
    features, channels, side, _ = weight.shape
    dy_rows = dy.permute(0, 2, 3, 1).to(compute_dtype).reshape(-1, features)
    gradients = []
    if any(needs[:3]):
        dpatches = dy_rows @ _matrix(weight, compute_dtype)
        held = dpatches.shape[0] // x.shape[0] * side * side  # pixels of a sample that are in patches
        dpatches = Rows(dpatches.view(-1, channels), held * channels, channels, 1)
        gradients += kernels.layernorm.gradients(
            dpatches, x, norm_weight, norm_bias, eps, needs[:3], patch=side, norm=norm
        )
    if needs[3]:
        patches, _ = _patches(kernels, call)
        dweight = (dy_rows.mT @ patches).view(features, side, side, channels).permute(0, 3, 1, 2)
        gradients.append(like_parameter(dweight, weight))
    if needs[4]:
        # PyTorch's sum accumulates in fp32 and in a fixed order
        gradients.append(like_parameter(dy_rows.sum(dim=0, dtype=torch.float32).to(bias.dtype), bias))
    return gradients
