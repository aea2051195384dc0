"""Depthwise transposed convolution of volumes: the input gradient of dwconv.py with stride 2, and back."""

import torch
from torch import Tensor

from convnext_kernels.backends.eager import dwconv
from convnext_kernels.backends.eager.layout import like, like_parameter
from convnext_kernels.calls import Dwconv3dTransposedCall


def forward(call: Dwconv3dTransposedCall) -> Tensor:
    """Convolve in `compute_dtype`; the result has x's dtype."""
    (y,) = dwconv.backward(call.x, call.convolution(call.result()), [True, False, False])
    return y if call.bias is None else y.add_(call.bias.view(-1, 1, 1, 1))


def backward(dy: Tensor, call: Dwconv3dTransposedCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    convolution, gradients = call.convolution(dy), []
    if needs[0]:
        gradients.append(like(dwconv.forward(convolution), call.x))
    if needs[1]:
        gradients += dwconv.backward(call.x, convolution, [False, True, False])
    if needs[2]:
        wide = torch.float32 if dy.dtype.itemsize == 2 else dy.dtype
        gradients.append(like_parameter(dy.sum((0, 2, 3, 4), dtype=wide), call.bias))
    return gradients
