"""Depthwise transposed convolution of volumes: the input gradient of dwconv.py with stride 2, and back."""

import torch
from torch import Tensor

from convnext_kernels.backends.gpu.layout import like_parameter
from convnext_kernels.backends.triton import dwconv
from convnext_kernels.backends.triton.launch import prepared
from convnext_kernels.calls import Dwconv3dTransposedCall


@prepared
def forward(call: Dwconv3dTransposedCall) -> Tensor:
    """Convolve in `compute_dtype`, sums in fp32; the result is in x's dtype and memory format."""
    out = call.result()
    return dwconv.convolve(call.x, call.convolution(out), call.bias, None, out, gradient=True)


@prepared
def backward(dy: Tensor, call: Dwconv3dTransposedCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    convolution, gradients = call.convolution(dy), []
    if needs[0]:
        gradients.append(dwconv.convolve(dy, convolution, None, None, torch.empty_like(call.x), gradient=False))
    if needs[1]:
        gradients.append(dwconv.parameter_gradients(call.x, convolution, True, False)[0])
    if needs[2]:
        gradients.append(like_parameter(dy.sum((0, 2, 3, 4), dtype=torch.float32), call.bias))
    return gradients
