"""The ConvNeXt block over time, as speech synthesis uses it (Vocos, arXiv 2306.00814; F5-TTS, arXiv 2410.06885)."""

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from convnext_kernels import functional
from convnext_kernels.exporting import Whole
from convnext_kernels.nn.block import FusedConvNeXtBlock
from convnext_kernels.nn.layers import positive_int
from convnext_kernels.ops import checks


class DepthwiseConv1d(Whole, nn.Conv1d):
    """Depthwise convolution of (N, C, L) with an odd kernel, stride 1 or 2, and zero padding that keeps the size.

    A `torch.nn.Conv1d` (so weight (C, 1, K), bias (C,), its state dict and its initialisation) with
    ``groups=channels``, computed by `functional.depthwise_conv1d`.

    Raises TypeError or ValueError for a kernel size that is even, negative or above 51, for channels or dilation below
    1, for another stride, and for an unknown backend.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        positive_int("channels", channels)
        checks.backend(backend)
        checks.kernel_size("kernel_size", positive_int("kernel_size", kernel_size), kernel_size)
        checks.stride(positive_int("stride", stride))
        padding = positive_int("dilation", dilation) * (kernel_size - 1) // 2
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, channels, bias, **factory)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, C, ceil(L / stride))."""
        if isinstance(x, Proxy):
            return self.node(x)
        options = {"stride": self.stride[0], "dilation": self.dilation[0], "backend": self.backend}
        return functional.depthwise_conv1d(x, self.weight, self.bias, **options)


class FusedConvNeXtBlock1d(FusedConvNeXtBlock):
    """The ConvNeXt block over time, V1 or, with `use_grn`, V2: GRN's norm is then over time.

    Parameters have the names and shapes of Vocos' ``ConvNeXtBlock`` and F5-TTS' ``ConvNeXtV2Block``. Arguments are
    those of `FusedConvNeXtBlock`, with one kernel size and one dilation, and

    Args:
        channels_last: x is (N, L, C), as in F5-TTS, not (N, C, L), as in Vocos.

    Raises what `FusedConvNeXtBlock` raises.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        *,
        kernel_size: int = 7,
        mlp_ratio: int = 4,
        dilation: int = 1,
        use_grn: bool = False,
        channels_last: bool = False,
        eps: float = 1e-6,
        norm: str = "layer",
        activation: str = "gelu",
        memory: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(channels_last, bool):
            raise TypeError(f"channels_last: expected a bool, got {channels_last!r}")
        options = {"mlp_ratio": mlp_ratio, "use_grn": use_grn, "eps": eps, "memory": memory, "backend": backend}
        options |= {"norm": norm, "activation": activation}
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, drop_path, layer_scale_init_value, kernel_size=1, **options, **factory)
        self.dwconv = DepthwiseConv1d(dim, kernel_size, dilation=dilation, **factory)
        if self.grn is not None:
            for name, parameter in list(self.grn.named_parameters()):
                setattr(self.grn, name, nn.Parameter(parameter.detach().view(1, 1, -1)))
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, C, L), or (N, L, C) -> (N, L, C) with `channels_last`; in x's memory format."""
        if isinstance(x, Proxy):
            return self.node(x)
        checks.sequence("x", x)
        image = (x.transpose(1, 2) if self.channels_last else x).unsqueeze(2)
        y = super().forward(image).squeeze(2)
        return y.transpose(1, 2) if self.channels_last else y

    def inference_block(self) -> None:
        """No part of a `FusedSequential`'s call: x has three dimensions."""

    def _parts(self) -> tuple:
        (dilation,), *modules, (weight, *tensors) = super()._parts()
        return (1, dilation), *modules, (weight.unsqueeze(2), *tensors)
