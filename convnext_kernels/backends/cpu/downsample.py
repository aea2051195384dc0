"""LayerNorm and patch convolution by csrc/cpu/downsample.cpp."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.dwconv import bias_or_zeros
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, output_for
from convnext_kernels.backends.cpu.packed import packed


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    compute_dtype: torch.dtype,
    out: Tensor,
) -> Tensor:
    """Fill `out` (its dtype and strides are the op's promise) and return it."""
    channels, (width, _, side, _) = x.shape[1], weight.shape
    isa, bf16 = native.isa(), compute_dtype == torch.bfloat16

    def pack() -> object:
        align = native.extension().CHANNEL_ALIGN
        patches = weight.detach().to(torch.float32).permute(0, 2, 3, 1)  # (D, K, K, C), C padded below
        patches = F.pad(patches, (0, -channels % align)).contiguous()
        b, nw, nb = bias_or_zeros(bias, width), flat_float(norm_weight), flat_float(norm_bias)
        return native.extension().Downsample(
            native.isa_code(isa),
            bf16,
            channels,
            width,
            side,
            eps,
            address(nw),
            address(nb),
            address(patches),
            address(b),
            torch.get_num_threads(),
        )

    parameters = (weight, bias, norm_weight, norm_bias)
    kernel = packed(weight, parameters, (isa, "downsample", bf16, eps), pack)
    x_nhwc = dense_nhwc(x)
    written, out = output_for(out)
    n, _, h, w = x.shape
    kernel.forward(
        native.DTYPE_CODES[x.dtype],
        native.DTYPE_CODES[out.dtype],
        address(x_nhwc),
        address(written),
        n,
        h,
        w,
        native.threads(out.numel() * channels * side * side),
    )
    return finish(written, out)
