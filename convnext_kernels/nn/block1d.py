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
        checks.kernel_size("kernel_size", positive_int("kernel_size", kernel_size))
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


class AdaLayerNorm(nn.Module):
    """Parameters of a LayerNorm whose weight and bias depend on a condition, an index from 0 to `count` - 1.

    Their rows are ``scale.weight`` and ``shift.weight``, (count, C), as in Vocos. `FusedConvNeXtBlock1d` computes it.
    """

    def __init__(
        self,
        count: int,
        channels: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("scale", 1.0), ("shift", 0.0)):
            rows = nn.Embedding(count, channels, device=device, dtype=dtype)
            nn.init.constant_(rows.weight, value)
            setattr(self, name, rows)

    @property
    def weight(self) -> Tensor:
        """The table of scales, (count, C)."""
        return self.scale.weight

    @property
    def bias(self) -> Tensor:
        """The table of shifts, (count, C)."""
        return self.shift.weight


def rows_of(condition: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    """The rows of the tables `scale` and `shift` (count, C) for `functional.adaptive_convnext_block`.

    `condition` holds integers: one for all samples, or (N, 1), one for each. The rows are (C,) if all samples share
    one, which is known where the values can be read without waiting: on a CPU. Elsewhere they are (N, C) or (1, C).

    Raises IndexError for a condition outside 0 to count - 1.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        values = condition.flatten().tolist()
        for value in values:
            if not 0 <= value < scale.shape[0]:
                raise IndexError(f"cond_embedding_id: expected 0 to {scale.shape[0] - 1}, got {value}")
        if len(set(values)) == 1:  # views, not copies: the CPU backend keeps packed parameters by address
            return [scale[values[0]], shift[values[0]]]
    return [nn.functional.embedding(condition.flatten(), table) for table in (scale, shift)]


def _check_condition(x: Tensor, condition: Tensor | None, adaptive: bool) -> None:
    if not adaptive:
        if condition is not None:
            raise TypeError("cond_embedding_id: expected None, the block was made without adanorm_num_embeddings")
        return
    if not isinstance(condition, Tensor) or condition.is_floating_point():
        kind = condition.dtype if isinstance(condition, Tensor) else type(condition).__name__
        raise TypeError(f"cond_embedding_id: expected a tensor of integers, got {kind}")
    if condition.numel() != 1 and tuple(condition.shape) != (x.shape[0], 1):
        shape = tuple(condition.shape)
        raise ValueError(f"cond_embedding_id: expected one integer or shape ({x.shape[0]}, 1), got shape {shape}")


class FusedConvNeXtBlock1d(FusedConvNeXtBlock):
    """The ConvNeXt block over time, V1 or, with `use_grn`, V2: GRN's norm is then over time.

    Parameters have the names and shapes of Vocos' ``ConvNeXtBlock`` and F5-TTS' ``ConvNeXtV2Block``. Arguments are
    those of `FusedConvNeXtBlock`, with one kernel size and one dilation, and

    Args:
        channels_last: x is (N, L, C), as in F5-TTS, not (N, C, L), as in Vocos.
        adanorm_num_embeddings: if given, LayerNorm's weight and bias are rows of tables with as many rows, and
            forward takes the index of a row: Vocos' ``AdaLayerNorm``.

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
        adanorm_num_embeddings: int | None = None,
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
        self.adanorm = adanorm_num_embeddings is not None
        if self.adanorm:
            if norm != "layer":
                raise ValueError(f"norm: expected 'layer' with adanorm_num_embeddings, got {norm!r}")
            count = positive_int("adanorm_num_embeddings", adanorm_num_embeddings)
            self.norm = AdaLayerNorm(count, dim, eps, **factory)

    def forward(self, x: Tensor, cond_embedding_id: Tensor | None = None) -> Tensor:
        """(N, C, L) -> (N, C, L), or (N, L, C) -> (N, L, C) with `channels_last`; in x's memory format.

        `cond_embedding_id`, with `adanorm_num_embeddings` only: integers, one, or (N, 1), one for each sample.
        """
        if isinstance(x, Proxy):
            return self.node(x, cond_embedding_id) if self.adanorm else self.node(x)
        checks.sequence("x", x, "N, L, C" if self.channels_last else "N, C, L")
        pwconv1 = ("pwconv1_weight", self.pwconv1.weight, 1)
        checks.sequence_weight("dwconv_weight", self.dwconv.weight, x, pwconv1, axis=2 if self.channels_last else 1)
        _check_condition(x, cond_embedding_id, self.adanorm)
        image = (x.transpose(1, 2) if self.channels_last else x).unsqueeze(2)
        y = self._adaptive(image, cond_embedding_id) if self.adanorm else self._compute(image, self._parts())
        y = y.squeeze(2)
        return y.transpose(1, 2) if self.channels_last else y

    def _adaptive(self, x: Tensor, condition: Tensor) -> Tensor:
        dilation, norm, grn, drop_path, tensors = self._parts()
        weight, bias, scale, shift, *pointwise, gamma, grn_weight, grn_bias = tensors
        return functional.adaptive_convnext_block(
            x,
            weight,
            bias,
            *rows_of(condition, scale, shift),
            *pointwise,
            gamma=gamma,
            grn_weight=grn_weight,
            grn_bias=grn_bias,
            drop_scale=drop_path.scale(x),
            dilation=dilation,
            eps=norm.eps,
            grn_eps=1e-6 if grn is None else grn.eps,
            activation=self.activation,
            memory=self.memory,
            backend=self.backend,
        )

    def inference_block(self) -> None:
        """No part of a `FusedSequential`'s call: x has three dimensions."""

    def _parts(self) -> tuple:
        (dilation,), *modules, (weight, *tensors) = super()._parts()
        return (1, dilation), *modules, (weight.unsqueeze(2), *tensors)
