"""A norm over the channels and patch convolution by csrc/cpu/downsample.cpp and downsample_backward.cpp."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.dwconv import bias_or_zeros
from convnext_kernels.backends.cpu.layout import (
    address,
    dense_nhwc,
    finish,
    flat_float,
    like_parameter,
    output_for,
    written_for,
)
from convnext_kernels.backends.cpu.packed import Known, Launch, packed
from convnext_kernels.calls import DownsampleCall


def _patches(weight: Tensor) -> Tensor:
    """(D, C, K, K) -> dense fp32 (D, K, K, padded C), the order the kernels read."""
    channels = weight.shape[1]
    patches = weight.detach().to(torch.float32).permute(0, 2, 3, 1)
    return F.pad(patches, (0, native.pad_channels(channels) - channels)).contiguous()


def forward(call: DownsampleCall) -> Tensor:
    """Normalise, then convolve in `compute_dtype`."""
    x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype, _ = call
    channels, (width, _, side, _) = x.shape[1], weight.shape
    isa, bf16 = native.isa(), compute_dtype == torch.bfloat16

    def pack() -> object:
        patches = _patches(weight)
        b, nw, nb = bias_or_zeros(bias, width), flat_float(norm_weight), bias_or_zeros(norm_bias, channels)
        return native.extension().Downsample(
            native.isa_code(isa),
            bf16,
            channels,
            width,
            side,
            eps,
            native.norm_code(norm),
            address(nw),
            address(nb),
            address(patches),
            address(b),
            torch.get_num_threads(),
        )

    parameters = (weight, bias, norm_weight, norm_bias)
    n, _, h, w = x.shape
    out = call.result()
    written = written_for(out)
    codes = native.DTYPE_CODES[x.dtype], native.DTYPE_CODES[out.dtype]
    sizes = n, h, w, native.threads(out.numel() * channels * side * side)
    known = launch = None
    if call.inputs is not None:
        known = Known(call.inputs.signature, call.inputs.tensors[1:], call.inputs.addresses[1:])
        direct = written is out and x.is_contiguous(memory_format=torch.channels_last)
        if direct and call.inputs.repeated is not None:
            launch = Launch(call.inputs.repeated, lambda kernel: kernel.launch(*codes, *sizes), out)
    kernel = packed(weight, parameters, (isa, "downsample", bf16, eps, norm), pack, known, launch=launch)
    x_nhwc = dense_nhwc(x)
    kernel.forward(*codes, x_nhwc.data_ptr(), written.data_ptr(), *sizes)
    return finish(written, out)


def backward(dy: Tensor, call: DownsampleCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, norm_weight, norm_bias, weight, bias) that `needs` marks, in that order."""
    x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype, _ = call
    n, channels, h, w = x.shape
    width, side = weight.shape[0], weight.shape[2]
    padded = native.pad_channels(channels)
    isa, bf16 = native.isa(), compute_dtype == torch.bfloat16

    def pack() -> object:
        patches, nw, nb = _patches(weight), flat_float(norm_weight), bias_or_zeros(norm_bias, channels)
        return native.extension().DownsampleBackward(
            native.isa_code(isa),
            bf16,
            channels,
            width,
            side,
            eps,
            native.norm_code(norm),
            address(nw),
            address(nb),
            address(patches),
            torch.get_num_threads(),
        )

    kernel = packed(weight, (weight, norm_weight, norm_bias), (isa, "downsample backward", bf16, eps, norm), pack)
    needs_norm, needs_weight = any(needs[:3]), needs[3] or needs[4]
    x_nhwc, dy_nhwc = dense_nhwc(x), dense_nhwc(dy)
    written, dx = output_for(x) if needs_norm else (None, None)
    if needs_norm and (h % side or w % side):
        written.zero_()  # pixels that are in no whole patch
    dweight, dbias = (torch.empty(width, side, side, padded), torch.empty(width)) if needs_weight else (None, None)
    dnorm_weight, dnorm_bias = (torch.empty(padded), torch.empty(padded)) if needs_norm else (None, None)
    kernel.backward(
        native.DTYPE_CODES[x.dtype],
        native.DTYPE_CODES[dy.dtype],
        address(x_nhwc),
        address(dy_nhwc),
        n,
        h,
        w,
        address(written),
        [address(dweight), address(dbias)],
        [address(dnorm_weight), address(dnorm_bias)],
        native.threads(2 * dy.numel() * channels * side * side),
    )
    gradients = [finish(written, dx)] if needs[0] else []
    if needs[1]:
        gradients.append(like_parameter(dnorm_weight[:channels], norm_weight))
    if needs[2]:
        gradients.append(like_parameter(dnorm_bias[:channels], norm_bias))
    if needs[3]:
        gradients.append(like_parameter(dweight[..., :channels].permute(0, 3, 1, 2).contiguous(), weight))
    if needs[4]:
        gradients.append(like_parameter(dbias, bias))
    return gradients
