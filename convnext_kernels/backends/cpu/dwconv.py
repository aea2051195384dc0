"""Depthwise convolution by csrc/cpu/dwconv.cpp and dwconv_wgrad.cpp; the input's gradient is also a convolution.

Of images (N, C, H, W) and, by the same kernels, of volumes (N, C, D, H, W).
"""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.layout import (
    address,
    dense_nhwc,
    finish,
    flat_float,
    like_parameter,
    pixels_of,
    written_for,
)
from convnext_kernels.backends.cpu.packed import packed
from convnext_kernels.calls import Dwconv3dCall, DwconvCall


def taps_first(weight: Tensor) -> Tensor:
    """(C, 1, KH, KW) -> dense fp32 (KH * KW, C), the order the kernels read; with a depth (KD * KH * KW, C)."""
    return weight.detach().to(torch.float32).flatten(1).t().contiguous()


def bias_or_zeros(bias: Tensor | None, length: int) -> Tensor:
    """Return the bias as a dense fp32 vector, zeros for None."""
    return torch.zeros(length) if bias is None else flat_float(bias)


def _sizes(t: Tensor) -> tuple[int, ...]:
    """Depth, height and width of an image, a volume or a weight; an image's depth is 1."""
    shape = t.shape
    return (1, shape[2], shape[3]) if len(shape) == 4 else shape[2:]


def forward(call: DwconvCall | Dwconv3dCall) -> Tensor:
    """Return y like x, or of half its size; sums in fp32."""
    out = torch.empty_like(call.x) if call.stride == 1 else call.result()  # the first way is 0.6 us shorter
    return convolve(call.x, call, call.bias, out)


def convolve(
    x: Tensor,
    call: DwconvCall | Dwconv3dCall,
    bias: Tensor | None,
    out: Tensor,
    *,
    flipped: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve x into `out`; `flipped`: x is the gradient of the call's result, `out` that of its input."""
    if len(call) == 7:
        _, weight, _, dilation, stride, _, _ = call
    else:
        _, weight, _, stride, _, _ = call
        dilation = (1, 1)
    n, channels = x.shape[:2]
    isa = native.isa()

    def pack() -> object:
        w, b = taps_first(weight), bias_or_zeros(bias, channels)
        if flipped:
            w = w.flip(0)
        strides = (1, stride) if flipped else (stride, 1)
        return native.extension().Depthwise(
            native.isa_code(isa), channels, *_sizes(weight), *dilation, *strides, address(w), address(b)
        )

    kernel = packed(weight, (weight, bias), (isa, "dwconv", dilation, stride, flipped), pack)
    x_nhwc, x_pixel = pixels_of(x)
    residual_nhwc = None if residual is None else dense_nhwc(residual)
    written = written_for(out)
    kernel.forward(
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(written),
        address(residual_nhwc),
        n,
        *_sizes(x),
        *_sizes(out),
        native.threads((x if flipped else out).numel() * (weight.numel() // channels)),
        x_pixel,
        channels,
    )
    return finish(written, out)


def backward(
    dy: Tensor, call: DwconvCall | Dwconv3dCall, needs: list[bool], residual: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; `residual` is added to x's."""
    x, weight, bias = call[:3]
    gradients = []
    if needs[0]:
        gradients.append(convolve(dy, call, None, torch.empty_like(x), flipped=True, residual=residual))
    if not (needs[1] or needs[2]):
        return gradients
    (n, channels), (d, h, w), sides = x.shape[:2], _sizes(x), _sizes(weight)
    padded, count = native.pad_channels(channels), weight.numel() // channels
    taps, total = torch.empty(count, padded), torch.empty(padded)
    (x_nhwc, x_pixel), (dy_nhwc, dy_pixel) = pixels_of(x), pixels_of(dy)
    native.extension().dwconv_weight_gradient(
        native.isa_code(native.isa()),
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(dy_nhwc),
        n,
        d,
        h,
        w,
        channels,
        *sides,
        # any larger dilation reaches outside the image as well
        min(call.dilation[0], h),
        min(call.dilation[1], w),
        call.stride,
        address(taps),
        address(total),
        native.threads(dy.numel() * count),
        x_pixel,
        dy_pixel,
    )
    if needs[1]:
        gradients.append(like_parameter(taps[:, :channels].t().contiguous(), weight))
    if needs[2]:
        gradients.append(like_parameter(total[:channels], bias))
    return gradients
