"""Depthwise convolution with zero padding that keeps the size at stride 1: y[n,c] = x[n,c] (*) weight[c] + bias[c].

x (N, C, H, W) in any memory format, weight (C, 1, KH, KW), bias (C,) or None; of volumes x (N, C, D, H, W) and weight
(C, 1, KD, KH, KW).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.eager.layout import into, like, like_parameter
from convnext_kernels.calls import Dwconv3dCall, DwconvCall


def _padding(weight: Tensor, dilation: tuple[int, ...]) -> list[int]:
    return [step * (side - 1) // 2 for step, side in zip(dilation, weight.shape[2:], strict=True)]


def _options(call: DwconvCall | Dwconv3dCall) -> tuple[tuple[int, ...], int, torch.dtype]:
    """The call's dilation of each axis, stride and compute dtype."""
    return call.dilation if call.x.dim() == 4 else (1, 1, 1), call.stride, call.compute_dtype


def forward(call: DwconvCall | Dwconv3dCall) -> Tensor:
    """Convolve in `compute_dtype`; the result has x's dtype."""
    x, weight, bias = call[:3]
    dilation, stride, compute_dtype = _options(call)
    convolve = F.conv2d if x.dim() == 4 else F.conv3d
    y = convolve(
        x.to(compute_dtype),
        weight.to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
        stride=stride,
        padding=_padding(weight, dilation),
        dilation=dilation,
        groups=x.shape[1],
    )
    return into(y, call.result())


def backward(dy: Tensor, call: DwconvCall | Dwconv3dCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    x, weight, bias = call[:3]
    dilation, stride, compute_dtype = _options(call)
    channels = x.shape[1]
    dy_, x_, weight_ = (t.to(compute_dtype) for t in (dy, x, weight))
    if x.device.type == "cpu" and compute_dtype.itemsize == 2 and max(dilation) > 1:
        # oneDNN's weight gradient is wrong for channels_last bf16, dilation above 1 and more than 28 columns (torch
        # 2.14.1, AVX-512 BF16); it even contains uninitialised memory. For contiguous tensors it is right. They are
        # always copied: PyTorch takes a channels_last weight (C, 1, K, K) for contiguous, but its strides select the
        # wrong kernel.
        dy_, x_, weight_ = (t.clone(memory_format=torch.contiguous_format) for t in (dy_, x_, weight_))
    if x.device.type == "cpu" and compute_dtype.itemsize == 2 and (stride > 1 or x.dim() == 5):
        # Here oneDNN's 16-bit weight gradient may contain uninitialised memory, too: of 3x100x13x1, K 7, by 3e12; of
        # volumes in channels_last_3d even at stride 1 (1x40x3x8x29, 7x3x1).
        dy_, x_, weight_ = (t.float() for t in (dy_, x_, weight_))
    dx, dw, db = torch.ops.aten.convolution_backward(
        dy_,
        x_,
        weight_,
        [channels],
        [stride] * len(dilation),
        _padding(weight, dilation),
        list(dilation),
        False,
        [0] * len(dilation),
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
