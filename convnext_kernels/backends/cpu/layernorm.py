"""LayerNorm, RMSNorm or SimpleNorm over the channels by csrc/cpu/layernorm.cpp."""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.dwconv import bias_or_zeros
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, like_parameter, output_for
from convnext_kernels.backends.cpu.packed import Known, Launch, packed
from convnext_kernels.calls import NormCall


def forward(call: NormCall) -> Tensor:
    """Return y like x; statistics in fp32."""
    x, weight, bias, eps, norm, inputs = call
    n, channels, h, w = x.shape
    isa, dtype = native.isa(), native.DTYPE_CODES[x.dtype]

    def pack() -> Any:
        # Every tensor whose address is passed has a name here: it must outlive the call.
        flat_weight, flat_bias = flat_float(weight), bias_or_zeros(bias, channels)
        codes = native.isa_code(isa), channels, eps, native.norm_code(norm)
        return native.extension().Layernorm(*codes, address(flat_weight), address(flat_bias))

    written, out = output_for(x)
    sizes = n * h * w, native.threads(x.numel() * 8)
    known = launch = None
    if inputs is not None:
        known = Known(inputs.signature, inputs.tensors[1:], inputs.addresses[1:])
        if inputs.repeated is not None and written is out and x.is_contiguous(memory_format=torch.channels_last):
            launch = Launch(inputs.repeated, lambda kernel: kernel.launch(dtype, *sizes), out)
    kernel = packed(weight, (weight, bias), (isa, "layernorm", channels, eps, norm), pack, known, launch=launch)
    x_nhwc = dense_nhwc(x)
    kernel.forward(dtype, x_nhwc.data_ptr(), written.data_ptr(), *sizes)
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
