"""Global response normalisation (ConvNeXt V2, arXiv 2301.00808, section 3.2), per sample n and channel c:

    G = ||x[n, :, :, c]||_2,    Nx = G / (mean_c G + eps),    y = weight * (x * Nx) + bias + x

Sums of squares are in fp32 (fp64 for fp64 input), so that fp16 does not overflow.
"""

import torch
from torch import Tensor

from convnext_kernels.backends.eager.layout import like, like_parameter, nchw, nhwc
from convnext_kernels.calls import NormCall


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward_nhwc(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GRN of (N, H, W, C)."""
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=_accumulation_dtype(x.dtype))
    response = (norm / (norm.mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
    return x + torch.addcmul(bias.flatten(), weight.flatten(), x * response)


def backward_nhwc(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias) for (N, H, W, C) tensors.

    With r = G / s, s = mean_c G + eps and q[n,c] = sum_hw dy * weight * x (the gradient of r):
    dG = q / s - mean_c(q * G) / s^2, and dG flows to x through x / G (0 where G = 0, as in PyTorch's norm).
    """
    acc = _accumulation_dtype(x.dtype)
    x_acc, dy_acc, w_acc = x.to(acc), dy.to(acc), weight.flatten().to(acc)
    norm = torch.linalg.vector_norm(x_acc, dim=(1, 2), keepdim=True)
    scale = norm.mean(dim=-1, keepdim=True) + eps
    response = norm / scale
    dy_x = (dy_acc * x_acc).sum(dim=(1, 2), keepdim=True)
    dweight = (dy_x * response).sum(dim=(0, 1, 2))
    dbias = dy_acc.sum(dim=(0, 1, 2))
    q = dy_x * w_acc
    dnorm = q / scale - (q * norm).mean(dim=-1, keepdim=True) / scale.square()
    per_x = torch.where(norm > 0, dnorm / norm, torch.zeros_like(norm))
    dx = dy_acc * (1 + w_acc * response) + x_acc * per_x
    return dx.to(x.dtype), dweight, dbias


def forward(call: NormCall) -> Tensor:
    """GRN of (N, C, H, W); the result has x's dtype and strides."""
    x, weight, bias, eps, *_ = call
    return like(nchw(forward_nhwc(nhwc(x), weight, bias, eps)), x)


def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    x, weight, bias, eps, *_ = call
    dx, dw, db = backward_nhwc(nhwc(dy), nhwc(x), weight, eps)
    gradients = []
    if needs[0]:
        gradients.append(like(nchw(dx), x))
    if needs[1]:
        gradients.append(like_parameter(dw, weight))
    if needs[2]:
        gradients.append(like_parameter(db, bias))
    return gradients
