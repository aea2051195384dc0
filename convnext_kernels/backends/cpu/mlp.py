"""The inverted bottleneck by csrc/cpu/mlp.cpp."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import bottleneck
from convnext_kernels.spec import MlpParameters

KEEPS_HIDDEN = False  # the gradient computes everything again from the inputs


def forward(
    x: Tensor,
    residual: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    eps: float,
    grn_eps: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """LN -> W1 -> GELU -> [GRN] -> W2 -> gamma -> drop scale -> + residual, in one pass."""
    return bottleneck.run(x, residual, None, p, drop_scale, eps, grn_eps, compute_dtype)
