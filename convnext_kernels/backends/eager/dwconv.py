"""Depthwise convolution with zero padding that keeps the size at stride 1: y[n,c] = x[n,c] (*) weight[c] + bias[c].

x (N, C, H, W) in any memory format, weight (C, 1, KH, KW), bias (C,) or None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.eager.layout import into, like, like_parameter
from convnext_kernels.calls import DwconvCall


def _padding(weight: Tensor, dilation: tuple[int, int]) -> list[int]:
    return [step * (side - 1) // 2 for step, side in zip(dilation, weight.shape[2:], strict=True)]


def forward(call: DwconvCall) -> Tensor:
    """Convolve in `compute_dtype`; the result has x's dtype."""
    x, weight, bias, dilation, stride, compute_dtype, _ = call
    y = F.conv2d(
        x.to(compute_dtype),
        weight.to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
        stride=stride,
        padding=_padding(weight, dilation),
        dilation=dilation,
        groups=x.shape[1],
    )
    return into(y, call.result())


def backward(dy: Tensor, call: DwconvCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    x, weight, bias, dilation, stride, compute_dtype, _ = call
    channels = x.shape[1]
    dy_, x_, weight_ = (t.to(compute_dtype) for t in (dy, x, weight))
    if x.device.type == "cpu" and compute_dtype.itemsize == 2 and max(dilation) > 1:
        # oneDNN's weight gradient is wrong for channels_last bf16, dilation above 1 and more than 28 columns (torch
        # 2.14.1, AVX-512 BF16); it even contains uninitialised memory. For contiguous tensors it is right. They are
        # always copied: PyTorch takes a channels_last weight (C, 1, K, K) for contiguous, but its strides select the
        # wrong kernel.
        dy_, x_, weight_ = (t.clone(memory_format=torch.contiguous_format) for t in (dy_, x_, weight_))
    if x.device.type == "cpu" and compute_dtype.itemsize == 2 and stride > 1:
        # Here oneDNN's 16-bit weight gradient may contain uninitialised memory, too: of 3x100x13x1, K 7, by 3e12.
        dy_, x_, weight_ = (t.float() for t in (dy_, x_, weight_))
    dx, dw, db = torch.ops.aten.convolution_backward(
        dy_,
        x_,
        weight_,
        [channels],
        [stride, stride],
        _padding(weight, dilation),
        list(dilation),
        False,
        [0, 0],
        channels,
        [needs[0], needs[1], needs[2]],
    )
    gradients = []
    if needs[0]:
        gradients.append(like(dx, x))
    if needs[1]:
        gradients.append(like_parameter(dw, weight))
    if needs[2]:
        gradients.append(like_parameter(db, bias))
    return gradients
