"""LayerNorm over the channels of (N, C, H, W): y = (x - mean_c) * rstd_c * weight + bias, biased variance.

The other norms of `variants` too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.eager.layout import like, like_parameter, nchw, nhwc
from convnext_kernels.calls import NormCall
from convnext_kernels.variants import LAYER, scaled, scaled_backward


def forward_nhwc(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    """LayerNorm, or another norm of `variants`, of (..., C)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps) if norm == LAYER else scaled(x, weight, eps, norm)


def forward(call: NormCall) -> Tensor:
    """Normalise every pixel over its channels; the result has x's dtype and strides."""
    x, weight, bias, eps, norm, _ = call
    return like(nchw(forward_nhwc(nhwc(x), weight, bias, eps, norm)), x)


def backward_nhwc(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
    norm: str = LAYER,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dweight, dbias) for (..., C) tensors; statistics are computed again from x."""
    if norm != LAYER:
        return *scaled_backward(dy, x, weight, eps, norm), None
    normalized = [x.shape[-1]]
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, normalized, weight, bias, eps)
    return torch.ops.aten.native_layer_norm_backward(dy, x, normalized, mean, rstd, weight, bias, needs)


def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    x, weight, bias, eps, norm, _ = call
    dx, dw, db = backward_nhwc(nhwc(dy).contiguous(), nhwc(x).contiguous(), weight, bias, eps, needs, norm)
    gradients = []
    if needs[0]:
        gradients.append(like(nchw(dx), x))
    if needs[1]:
        gradients.append(like_parameter(dw, weight))
    if needs[2]:
        gradients.append(like_parameter(db, bias))
    return gradients
