"""LayerNorm over the channels by csrc/cpu/layernorm.cpp."""

from torch import Tensor

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, output_for


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return y like x; statistics in fp32."""
    weight, bias = flat_float(weight), flat_float(bias)
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
        address(weight),
        address(bias),
        native.threads(x.numel() * 8),
    )
    return finish(written, out)
