"""Depthwise convolution, stride 1, "same" padding, and its gradients, by csrc/cuda/dwconv.cu and dwconv_wgrad.cu.

x (N, C, H, W) with any strides, weight (C, 1, KH, KW), both odd, bias (C,) or None. Values are rounded to the compute
dtype; multiplications and sums are in fp32 for every dtype.
"""

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.gpu.layout import flat
from convnext_kernels.calls import DwconvCall


def _near(dilation: tuple[int, int], x: Tensor) -> tuple[int, int]:
    """The dilations; any larger than the image reaches outside like one of its size."""
    return min(dilation[0], x.shape[2]), min(dilation[1], x.shape[3])


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    dilation: tuple[int, int],
    flip: bool,
) -> None:
    """Write the convolution of x (+ bias, + residual) into `out`, whatever its strides."""
    n, channels, height, width = x.shape
    weight = weight.detach().to(x.dtype).contiguous()
    native.kernels().dwconv(
        native.context(x),
        native.image(x),
        native.image(out),
        native.image(residual),
        native.address(weight),
        native.vector(bias),
        n,
        channels,
        height,
        width,
        *weight.shape[2:],
        *_near(dilation, x),
        flip,
    )


@native.prepared
def forward(call: DwconvCall, out: Tensor | None = None) -> Tensor:
    """Convolve in `compute_dtype`, sums in fp32; the result is like x, or written to `out` in its dtype and strides."""
    x, weight, bias, dilation, _, compute_dtype, _ = call
    if out is None:
        out = torch.empty_like(x)
    bias = None if bias is None else flat(bias).to(compute_dtype)
    _convolve(x.to(compute_dtype), weight, bias, None, out, dilation, flip=False)
    return out


def input_gradient(dy: Tensor, call: DwconvCall, residual: Tensor | None = None) -> Tensor:
    """Return dx = dy (*) flipped weight [+ residual], with the dtype and strides `torch.empty_like(x)` has."""
    dx = torch.empty_like(call.x)
    _convolve(dy.to(call.compute_dtype), call.weight, None, residual, dx, call.dilation, flip=True)
    return dx


def parameter_gradients(
    dy: Tensor, call: DwconvCall, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dw, db) like weight and bias, None for what is not needed. Bitwise the same every time."""
    x, weight, bias, dilation, _, compute_dtype, _ = call
    n, channels, height, width = x.shape
    dw = torch.empty_like(weight) if needs_weight else None
    db = torch.empty_like(bias) if needs_bias else None
    where = native.context(x)
    kernel_h, kernel_w = weight.shape[2:]
    sizes = (n, channels, height, width, kernel_h, kernel_w, *_near(dilation, x))
    parts = native.extension().dwconv_weight_parts(where, native.DTYPE_CODES[compute_dtype], *sizes)
    partials = torch.empty((parts, kernel_h * kernel_w + 1, channels), dtype=torch.float32, device=x.device)
    native.kernels().dwconv_weight_gradient(
        where,
        native.image(dy.to(compute_dtype)),
        native.image(x.to(compute_dtype)),
        native.image(dw),
        native.vector(db),
        native.address(partials),
        *sizes,
    )
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
