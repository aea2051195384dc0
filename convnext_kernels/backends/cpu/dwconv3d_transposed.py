"""Depthwise transposed convolution of volumes: the input gradient of dwconv.py with stride 2, and back."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import dwconv
from convnext_kernels.backends.cpu.layout import like_parameter
from convnext_kernels.calls import Dwconv3dTransposedCall


def forward(call: Dwconv3dTransposedCall) -> Tensor:
    """Return y in x's dtype and memory format; sums in fp32."""
    out = call.result()
    return dwconv.convolve(call.x, call.convolution(out), call.bias, out, flipped=True)


def backward(dy: Tensor, call: Dwconv3dTransposedCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    convolution, gradients = call.convolution(dy), []
    if needs[0]:
        gradients.append(dwconv.convolve(dy, convolution, None, torch.empty_like(call.x)))
    if needs[1]:
        gradients += dwconv.backward(call.x, convolution, [False, True, False])
    if needs[2]:
        gradients.append(like_parameter(dy.sum((0, 2, 3, 4), dtype=torch.float32), call.bias))
    return gradients
