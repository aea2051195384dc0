"""Depthwise convolution by csrc/cpu/dwconv.cpp and dwconv_wgrad.cpp; the input's gradient is also a convolution."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, like_parameter, output_for
from convnext_kernels.backends.cpu.packed import packed
from convnext_kernels.calls import DwconvCall


def taps_first(weight: Tensor) -> Tensor:
    """(C, 1, K, K) -> dense fp32 (K * K, C), the order the kernels read."""
    return weight.detach().to(torch.float32).flatten(1).t().contiguous()


def bias_or_zeros(bias: Tensor | None, length: int) -> Tensor:
    """Return the bias as a dense fp32 vector, zeros for None."""
    return torch.zeros(length) if bias is None else flat_float(bias)


def forward(call: DwconvCall) -> Tensor:
    """Return y like x; sums in fp32."""
    x, weight, bias, (dilation, _) = call[:4]
    return _convolve(x, weight, bias, dilation, flipped=False, like=x)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    flipped: bool,
    like: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    channels, side = x.shape[1], weight.shape[-1]
    isa = native.isa()

    def pack() -> object:
        w, b = taps_first(weight), bias_or_zeros(bias, channels)
        if flipped:
            w = w.flip(0)
        return native.extension().Depthwise(native.isa_code(isa), channels, side, dilation, address(w), address(b))

    kernel = packed(weight, (weight, bias), (isa, "dwconv", dilation, flipped), pack)
    x_nhwc = dense_nhwc(x)
    residual_nhwc = None if residual is None else dense_nhwc(residual)
    written, out = output_for(like)
    n, _, h, w = x.shape
    kernel.forward(
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(written),
        address(residual_nhwc),
        n,
        h,
        w,
        native.threads(x.numel() * side * side),
    )
    return finish(written, out)


def backward(dy: Tensor, call: DwconvCall, needs: list[bool], residual: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; `residual` is added to x's."""
    x, weight, bias, (dilation, _) = call[:4]
    gradients = []
    if needs[0]:
        gradients.append(_convolve(dy, weight, None, dilation, flipped=True, like=x, residual=residual))
    if not (needs[1] or needs[2]):
        return gradients
    n, channels, h, w = x.shape
    side = weight.shape[-1]
    padded = native.pad_channels(channels)
    taps, total = torch.empty(side * side, padded), torch.empty(padded)
    x_nhwc, dy_nhwc = dense_nhwc(x), dense_nhwc(dy)
    native.extension().dwconv_weight_gradient(
        native.isa_code(native.isa()),
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(dy_nhwc),
        n,
        h,
        w,
        channels,
        side,
        dilation,
        address(taps),
        address(total),
        native.threads(x.numel() * side * side),
    )
    if needs[1]:
        gradients.append(like_parameter(taps[:, :channels].t().contiguous(), weight))
    if needs[2]:
        gradients.append(like_parameter(total[:channels], bias))
    return gradients
