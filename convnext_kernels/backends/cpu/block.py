"""The whole ConvNeXt block by csrc/cpu/mlp.cpp."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import bottleneck
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
    """Return x + the inverted bottleneck of the depthwise convolution of x, in one pass."""
    return bottleneck.run(x, x, (weight, bias, dilation), p, drop_scale, eps, grn_eps, compute_dtype)
