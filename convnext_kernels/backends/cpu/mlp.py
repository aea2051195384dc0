"""The inverted bottleneck by csrc/cpu/mlp.cpp and mlp_backward.cpp."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import mlp_native
from convnext_kernels.backends.cpu.layout import like_parameter
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters

KEEPS_HIDDEN = True


def forward(call: MlpCall, hidden: Tensor | None = None) -> Tensor:
    """Norm -> W1 -> activation -> [GRN] -> W2 -> gamma -> drop scale -> + residual, in one pass.

    `hidden` (N, hidden, H, W) is filled with W1's result for the gradient.
    """
    return mlp_native.run(call, call.residual, None, kept_hidden=hidden)


def backward(dout: Tensor, call: MlpCall, needs: list[bool], hidden: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of (x, residual, *p) that `needs` marks, in that order."""
    x, residual, p, drop_scale, *options, compute_dtype, _ = call
    needs_norm, needs_weights = needs[0] or needs[2] or needs[3], any(needs[4:9])
    dx, named = mlp_native.backward(dout, x, p, drop_scale, *options, compute_dtype, needs_norm, needs_weights, hidden)
    inputs = [dx] if needs[0] else []
    if needs[1]:
        inputs.append(torch.empty_like(residual).copy_(dout))  # an op may not return its input
    return inputs + [
        like_parameter(named[name], getattr(p, name))
        for name, needed in zip(MlpParameters._fields, needs[2:], strict=True)
        if needed
    ]
