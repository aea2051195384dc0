"""LayerNorm, RMSNorm or SimpleNorm over the channels by csrc/cpu/layernorm.cpp."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.dwconv import bias_or_zeros
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, like_parameter, output_for
from convnext_kernels.calls import NormCall


def forward(call: NormCall) -> Tensor:
    """Return y like x; statistics in fp32."""
    x, weight, bias, eps, norm, _ = call
    weight = flat_float(weight)
    bias = bias_or_zeros(bias, x.shape[1])
    x_nhwc = dense_nhwc(x)
    written, out = output_for(x)
    n, channels, h, w = x.shape
    native.extension().layernorm(
        native.isa_code(native.isa()),
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(written),
        n * h * w,
        channels,
        eps,
        native.norm_code(norm),
        address(weight),
        address(bias),
        native.threads(x.numel() * 8),
    )
    return finish(written, out)


def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; statistics are computed again."""
    x, weight, bias, eps, norm, _ = call
    n, channels, h, w = x.shape
    padded = native.pad_channels(channels)
    dweight, dbias = torch.empty(padded), torch.empty(padded)
    flat_weight = flat_float(weight)
    x_nhwc, dy_nhwc = dense_nhwc(x), dense_nhwc(dy)
    written, dx = output_for(x)
    native.extension().layernorm_backward(
        native.isa_code(native.isa()),
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(dy_nhwc),
        address(written),
        n * h * w,
        channels,
        eps,
        native.norm_code(norm),
        address(flat_weight),
        address(dweight),
        address(dbias),
        native.threads(x.numel() * 16),
    )
    gradients = [finish(written, dx)] if needs[0] else []
    sums = ((dweight, weight), (dbias, bias))
    return gradients + [
        like_parameter(s[:channels], p) for (s, p), needed in zip(sums, needs[1:], strict=True) if needed
    ]
