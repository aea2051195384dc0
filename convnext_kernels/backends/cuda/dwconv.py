"""Depthwise convolution, "same" padding, stride 1 or 2, and its gradients, by csrc/cuda/dwconv.

x (N, C, H, W) with any strides, weight (C, 1, KH, KW), both odd, bias (C,) or None. Values are rounded to the compute
dtype; multiplications and sums are in fp32 for every dtype.
"""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.gpu.layout import flat
from convnext_kernels.calls import DwconvCall


def _convolution(call: DwconvCall, gradient: bool = False) -> Any:
    """The sizes for the kernels; of the input gradient, which is a convolution of dy, if `gradient`."""
    n, channels, *larger = call.x.shape
    smaller = [(size - 1) // call.stride + 1 for size in larger]
    sizes, results = (smaller, larger) if gradient else (larger, smaller)
    # any dilation larger than the image reaches outside like one of its size
    dilation = (min(step, size) for step, size in zip(call.dilation, larger, strict=True))
    axes = zip(sizes, results, call.weight.shape[2:], dilation, strict=True)
    strides = (1, call.stride) if gradient else (call.stride, 1)
    return native.extension().Convolution(n, channels, *(number for axis in axes for number in axis), *strides)


def _convolve(
    x: Tensor, call: DwconvCall, bias: Tensor | None, residual: Tensor | None, out: Tensor, gradient: bool
) -> None:
    """Write the convolution of x (+ bias, + residual) into `out`, whatever its strides.

    gradient: x is the gradient of the call's result, `out` that of its input.
    """
    weight = call.weight.detach().to(x.dtype).contiguous()
    tensors = *map(native.image, (x, out, residual)), native.address(weight), native.vector(bias)
    native.kernels().dwconv(native.context(x), _convolution(call, gradient), *tensors, gradient)


@native.prepared
def forward(call: DwconvCall, out: Tensor | None = None) -> Tensor:
    """Convolve in `compute_dtype`, sums in fp32; the result is like x, or written to `out` in its dtype and strides."""
    if out is None:
        out = call.result()
    bias = None if call.bias is None else flat(call.bias).to(call.compute_dtype)
    _convolve(call.x.to(call.compute_dtype), call, bias, None, out, gradient=False)
    return out


def input_gradient(dy: Tensor, call: DwconvCall, residual: Tensor | None = None) -> Tensor:
    """Return dx = dy (*) flipped weight [+ residual], like x; with a residual in its dtype."""
    dx = torch.empty_like(call.x, dtype=None if residual is None else residual.dtype)
    _convolve(dy.to(call.compute_dtype), call, None, residual, dx, gradient=True)
    return dx


def parameter_gradients(
    dy: Tensor, call: DwconvCall, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dw, db) like weight and bias, None for what is not needed. Bitwise the same every time."""
    x, weight, bias, compute_dtype = call.x, call.weight, call.bias, call.compute_dtype
    dw = torch.empty_like(weight) if needs_weight else None
    db = torch.empty_like(bias) if needs_bias else None
    where = native.context(x)
    of = _convolution(call)
    parts = native.extension().dwconv_weight_parts(where, native.DTYPE_CODES[compute_dtype], of)
    taps = weight.shape[2] * weight.shape[3]
    partials = torch.empty((parts, taps + 1, x.shape[1]), dtype=torch.float32, device=x.device)
    tensors = native.image(dy.to(compute_dtype)), native.image(x.to(compute_dtype)), native.image(dw)
    native.kernels().dwconv_weight_gradient(where, of, *tensors, native.vector(db), native.address(partials))
    return dw, db


@native.prepared
def backward(dy: Tensor, call: DwconvCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    dx = dw = db = None
    if needs[0]:
        dx = input_gradient(dy, call)
    if needs[1] or needs[2]:
        dw, db = parameter_gradients(dy, call, needs[1], needs[2])
    return [gradient for gradient in (dx, dw, db) if gradient is not None]
