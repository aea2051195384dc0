"""The layers of a ConvNeXt. All take (N, C, H, W) in any memory format; the result has the same format."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from convnext_kernels import functional
from convnext_kernels.exporting import Whole
from convnext_kernels.ops import checks
from convnext_kernels.variants import ACTIVATIONS, LAYER


def positive_int(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1; TypeError or ValueError with its name otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value}")
    return value


def _depthwise(
    channels: int,
    kernel_size: int | tuple[int, ...],
    stride: int,
    dilation: int | tuple[int, ...],
    backend: str,
    each: Callable[[str, int | tuple[int, ...]], tuple[int, ...]],
) -> dict[str, Any]:
    """Check the arguments of a depthwise convolution; return those of PyTorch's. `each`: one value for each axis."""
    positive_int("channels", channels)
    checks.backend(backend)
    sides = [positive_int("kernel_size", side) for side in each("kernel_size", kernel_size)]
    checks.kernel_size("kernel_size", *sides)
    steps = [positive_int("dilation", step) for step in each("dilation", dilation)]
    checks.stride(positive_int("stride", stride))
    return {
        "in_channels": channels,
        "out_channels": channels,
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": tuple(step * (side - 1) // 2 for step, side in zip(steps, sides, strict=True)),
        "dilation": dilation,
        "groups": channels,
    }


class DepthwiseConv2d(Whole, nn.Conv2d):
    """Depthwise convolution with an odd kernel, stride 1 or 2 and zero padding that keeps the size at stride 1.

    A `torch.nn.Conv2d` (so weight (C, 1, KH, KW), bias (C,), its state dict and its initialisation) with
    ``groups=channels``, computed by `functional.depthwise_conv2d`. `kernel_size` and `dilation` are one integer for
    both axes or (height, width).

    Raises TypeError or ValueError for a kernel size that is even, negative or above 51, for channels or dilation below
    1, for another stride and for an unknown backend.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 7,
        *,
        stride: int = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = _depthwise(channels, kernel_size, stride, dilation, backend, checks.pair)
        super().__init__(**arguments, bias=bias, device=device, dtype=dtype)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), with stride 2 (N, C, ceil(H / 2), ceil(W / 2))."""
        if isinstance(x, Proxy):
            return self.node(x)
        return functional.depthwise_conv2d(
            x, self.weight, self.bias, stride=self.stride[0], dilation=self.dilation, backend=self.backend
        )


class DepthwiseConv3d(Whole, nn.Conv3d):
    """Depthwise convolution of volumes: odd kernel, stride 1 or 2, zero padding that keeps the size at stride 1.

    A `torch.nn.Conv3d` (so weight (C, 1, KD, KH, KW), bias (C,), its state dict and its initialisation) with
    ``groups=channels``, computed by `functional.depthwise_conv3d`. `kernel_size` is one integer for all axes or (depth,
    height, width).

    Raises TypeError or ValueError for a kernel size that is even, negative or above 7, for channels below 1, for
    another stride and for an unknown backend.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        *,
        stride: int = 1,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = _depthwise(channels, kernel_size, stride, 1, backend, checks.triple)
        super().__init__(**arguments, bias=bias, device=device, dtype=dtype)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C, D, H, W), each size ceil(size / 2) with stride 2."""
        if isinstance(x, Proxy):
            return self.node(x)
        return functional.depthwise_conv3d(x, self.weight, self.bias, stride=self.stride[0], backend=self.backend)


class LayerNorm2d(Whole, nn.Module):
    """LayerNorm over the channels of (N, C, H, W), with fp32 statistics; parameters ``weight``, ``bias`` (C,)."""

    norm = LAYER

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.epsilon("eps", eps)
        checks.backend(backend)
        self.weight = nn.Parameter(torch.ones(positive_int("channels", channels), device=device, dtype=dtype))
        bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if self.norm == LAYER else None
        self.register_parameter("bias", bias)
        self.eps = eps
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if isinstance(x, Proxy):
            return self.node(x)
        options = {"eps": self.eps, "norm": self.norm, "backend": self.backend}
        return functional.layer_norm2d(x, self.weight, self.bias, **options)

    def extra_repr(self) -> str:
        """Show the arguments in the module's repr."""
        return f"{self.weight.numel()}, eps={self.eps}"


class RMSNorm2d(LayerNorm2d):
    """RMSNorm over the channels of (N, C, H, W), with fp32 statistics; parameter ``weight`` (C,)."""

    norm = "rms"


class SimpleNorm2d(LayerNorm2d):
    """The same for timm's SimpleNorm."""

    norm = "simple"


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), element by element."""

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of any shape."""
        return ACTIVATIONS["quick_gelu"].forward(x)


def widened(conv: nn.Conv2d, x: Tensor) -> Tensor | None:
    """The convolution of bf16 images on a CPU, computed in fp32; None for all others.

    For machines without products of bf16, where PyTorch is slow in bf16: the stem of ConvNeXt-T at batch 1 takes 5.5
    ms with oneDNN limited to AVX2, in fp32 with both conversions 0.7 (one thread of an AMD EPYC).
    """
    if not isinstance(x, Tensor) or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return None
    bias = None if conv.bias is None else conv.bias.float()
    return conv._conv_forward(x.float(), conv.weight.float(), bias).to(x.dtype)


class WideningConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` that computes bf16 images on a CPU in fp32 (`widened`)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H', W')."""
        result = widened(self, x)
        return super().forward(x) if result is None else result


class PatchDownsample2d(Whole, nn.Sequential):
    """ConvNeXt's downsampling layer (section 2.6): LayerNorm over the channels, then a KxK convolution with stride K.

    The children are ``0``, a `LayerNorm2d`, and ``1``, a `torch.nn.Conv2d`, as in the official models. One call of
    `functional.patch_downsample` computes both, so hooks on the children are not called.

    Raises TypeError or ValueError for channels or a kernel size below 1 and for an unknown backend.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int = 2,
        *,
        eps: float = 1e-6,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        side = positive_int("kernel_size", kernel_size)
        positive_int("out_channels", out_channels)
        factory = {"device": device, "dtype": dtype}
        norm = LayerNorm2d(channels, eps, backend=backend, **factory)
        super().__init__(norm, nn.Conv2d(channels, out_channels, side, stride=side, bias=bias, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H // K, W // K)."""
        if isinstance(x, Proxy):
            return self.node(x)
        norm, conv = self._modules.values()
        first, second = norm._parameters, conv._parameters  # nn.Module looks attributes up in Python, 0.4 us each
        try:
            tensors = first["weight"], first["bias"], second["weight"], second["bias"]
        except KeyError:  # a parametrisation computes one of them
            tensors = norm.weight, norm.bias, conv.weight, conv.bias
        return functional.patch_downsample(x, *tensors, eps=norm.eps, backend=norm.backend)


class GlobalResponseNorm(Whole, nn.Module):
    """Global response normalisation (arXiv 2301.00808); ``gamma``, ``beta`` (1, 1, 1, C), initialised with zeros.

    The official layer takes NHWC; this one takes (N, C, H, W) in any memory format, like all layers here. An NHWC
    tensor that is passed as ``x.permute(0, 3, 1, 2)`` is not copied.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.epsilon("eps", eps)
        checks.backend(backend)
        shape = (1, 1, 1, positive_int("channels", channels))
        self.gamma = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.eps = eps
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if isinstance(x, Proxy):
            return self.node(x)
        return functional.global_response_norm(x, self.gamma, self.beta, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        """Show the arguments in the module's repr."""
        return f"{self.gamma.numel()}, eps={self.eps}"


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382); draws the same random numbers as timm's.

    In training, each sample's branch is dropped with probability `drop_prob`, and a kept one is divided by
    ``1 - drop_prob``. `scale` returns only the factors, for a kernel that applies them itself.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        checks.number("drop_path", drop_prob)
        if not (math.isfinite(drop_prob) and 0 <= drop_prob < 1):
            raise ValueError(f"drop_path: expected a probability from 0 up to but not including 1, got {drop_prob}")
        self.drop_prob = float(drop_prob)

    def scale(self, x: Tensor) -> Tensor | None:
        """Return the factor of each sample of x, shape (N, 1, 1, ...), or None when nothing is dropped."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1 - self.drop_prob
        return x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every sample of x."""
        scale = self.scale(x)
        return x if scale is None else x * scale

    def extra_repr(self) -> str:
        """Show the arguments in the module's repr."""
        return f"drop_prob={self.drop_prob}"
