"""Global response normalisation by csrc/cpu/grn.cpp."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, like_parameter, output_for
from convnext_kernels.calls import NormCall


def forward(call: NormCall) -> Tensor:
    """Return y like x; sums of squares are in fp32 and add the pixels in order."""
    x, weight, bias, eps, *_ = call
    weight, bias = flat_float(weight), flat_float(bias)
    x_nhwc = dense_nhwc(x)
    written, out = output_for(x)
    n, channels, h, w = x.shape
    native.extension().grn(
        native.isa_code(native.isa()),
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(written),
        n,
        h * w,
        channels,
        eps,
        address(weight),
        address(bias),
        native.threads(x.numel() * 4),
    )
    return finish(written, out)


def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    x, weight, bias, eps, *_ = call
    n, channels, h, w = x.shape
    padded = native.pad_channels(channels)
    dweight, dbias = torch.empty(padded), torch.empty(padded)
    flat_weight = flat_float(weight)
    x_nhwc, dy_nhwc = dense_nhwc(x), dense_nhwc(dy)
    written, dx = output_for(x)
    native.extension().grn_backward(
        native.isa_code(native.isa()),
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(dy_nhwc),
        address(written),
        n,
        h * w,
        channels,
        eps,
        address(flat_weight),
        address(dweight),
        address(dbias),
        native.threads(x.numel() * 8),
    )
    gradients = [finish(written, dx)] if needs[0] else []
    sums = ((dweight, weight), (dbias, bias))
    return gradients + [
        like_parameter(s[:channels], p) for (s, p), needed in zip(sums, needs[1:], strict=True) if needed
    ]
