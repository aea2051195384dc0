"""The ConvNeXt block: `mlp` on the depthwise convolution of x, with x as the residual."""

import torch
from torch import Tensor

from convnext_kernels.backends.eager import dwconv, mlp
from convnext_kernels.spec import MlpParameters

KEEPS_HIDDEN = False  # the gradient computes everything again from the inputs


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    dilation: int,
    eps: float,
    grn_eps: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Return x + s * gamma * MLP(LN(dwconv(x))) with x's dtype and strides."""
    y = dwconv.forward(x, weight, bias, dilation, compute_dtype)
    return mlp.forward(y, x, p, drop_scale, eps, grn_eps, compute_dtype)


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    dilation: int,
    eps: float,
    grn_eps: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of (x, weight, bias, *p) that `needs` marks, in that order.

    The forward pass keeps only x, so the convolution and the hidden are computed again.
    """
    y = dwconv.forward(x, weight, bias, dilation, compute_dtype)
    needs_dy = any(needs[:3])
    gradients = mlp.backward(dout, y, None, p, drop_scale, eps, grn_eps, compute_dtype, [needs_dy, False, *needs[3:]])
    if not needs_dy:
        return gradients
    dy = gradients.pop(0)
    convolution = dwconv.backward(dy, x, weight, bias, dilation, compute_dtype, needs[:3])
    if needs[0]:
        convolution[0] = convolution[0].add_(dout)  # the gradient of the residual
    return convolution + gradients
