"""Depthwise convolution, stride 1, "same" padding, and its gradients, by csrc/cuda/dwconv.cu and dwconv_wgrad.cu.

x (N, C, H, W) with any strides, weight (C, 1, K, K) with K odd, bias (C,) or None. Values are rounded to the compute
dtype; multiplications and sums are in fp32 for every dtype.
"""

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.gpu.layout import flat
from convnext_kernels.calls import DwconvCall


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, dilation: int, flip: bool
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
        weight.shape[-1],
        min(dilation, max(height, width)),  # any larger dilation reaches outside the image as well
        flip,
    )


@native.prepared
def forward(call: DwconvCall, out: Tensor | None = None) -> Tensor:
    """Convolve in `compute_dtype`, sums in fp32; the result is like x, or written to `out` in its dtype and strides."""
    x, weight, bias, (dilation, _), _, compute_dtype, _ = call
    if out is None:
        out = torch.empty_like(x)
    bias = None if bias is None else flat(bias).to(compute_dtype)
    _convolve(x.to(compute_dtype), weight, bias, None, out, dilation, flip=False)
    return out


def input_gradient(
    dy: Tensor,
    weight: Tensor,
    dilation: int,
    compute_dtype: torch.dtype,
    like: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Return dx = dy (*) flipped weight [+ residual], with the dtype and strides `torch.empty_like(like)` has."""
    dx = torch.empty_like(like)
    _convolve(dy.to(compute_dtype), weight, None, residual, dx, dilation, flip=True)
    return dx


def parameter_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    compute_dtype: torch.dtype,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dw, db) like weight and bias, None for what is not needed. Bitwise the same every time."""
    n, channels, height, width = x.shape
    side = weight.shape[-1]
    dilation = min(dilation, max(height, width))
    dw = torch.empty_like(weight) if needs_weight else None
    db = torch.empty_like(bias) if needs_bias else None
    where = native.context(x)
    sizes = (n, channels, height, width, side, dilation)
    parts = native.extension().dwconv_weight_parts(where, native.DTYPE_CODES[compute_dtype], *sizes)
    partials = torch.empty((parts, side * side + 1, channels), dtype=torch.float32, device=x.device)
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
    x, weight, bias, (dilation, _), _, compute_dtype, _ = call
    dx = dw = db = None
    if needs[0]:
        dx = input_gradient(dy, weight, dilation, compute_dtype, like=x)
    if needs[1] or needs[2]:
        dw, db = parameter_gradients(dy, x, weight, bias, dilation, compute_dtype, needs[1], needs[2])
    return [gradient for gradient in (dx, dw, db) if gradient is not None]
