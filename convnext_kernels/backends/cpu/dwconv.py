"""Depthwise convolution by csrc/cpu/dwconv.cpp."""

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, output_for
from convnext_kernels.backends.cpu.packed import packed


def taps_first(weight: Tensor) -> Tensor:
    """(C, 1, K, K) -> dense fp32 (K * K, C), the order the kernels read."""
    return weight.detach().to(torch.float32).flatten(1).t().contiguous()


def bias_or_zeros(bias: Tensor | None, length: int) -> Tensor:
    """Return the bias as a dense fp32 vector, zeros for None."""
    return torch.zeros(length) if bias is None else flat_float(bias)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, compute_dtype: torch.dtype) -> Tensor:
    """Return y like x; sums in fp32."""
    channels, side = x.shape[1], weight.shape[-1]
    isa = native.isa()

    def pack() -> object:
        w, b = taps_first(weight), bias_or_zeros(bias, channels)
        return native.extension().Depthwise(native.isa_code(isa), channels, side, dilation, address(w), address(b))

    kernel = packed(weight, (weight, bias), (isa, "dwconv", dilation), pack)
    x_nhwc = dense_nhwc(x)
    written, out = output_for(x)
    n, _, h, w = x.shape
    code = native.DTYPE_CODES[x.dtype]
    kernel.forward(code, address(x_nhwc), address(written), n, h, w, native.threads(x.numel() * side * side))
    return finish(written, out)
