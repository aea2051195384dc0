"""The layers between the blocks: LayerNorm or another norm over channels, alone or before a patch convolution."""

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, Adapter, Arguments
from convnext_kernels.interop.structure import parameter


def channels_last(x: Tensor) -> Tensor:
    """``x.contiguous(memory_format=torch.channels_last)``, which vmap does not support."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class LayerNorm2dAdapter(Adapter):
    """LayerNorm over the channels of (N, C, H, W), or another norm of `variants`."""

    kind = "layer norm"

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return weight and bias, or the reason: a LayerNorm without them, or over more dimensions."""
        affine = cls.affine(module)
        if isinstance(affine, str):
            return affine
        if len(module.normalized_shape) != 1:
            return f"the norm is over {tuple(module.normalized_shape)}"
        return Arguments(module.normalized_shape[0], affine[1], None, affine[0])

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Refuse 16-bit input under autocast, because the result's dtype depends on the device in PyTorch."""
        return super().serves(x, arguments) and (
            x.dtype in (torch.float32, torch.float64) or not structure.autocasting(x)
        )

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Normalise; like the original's, the result is channels_last, and so are the layers after it."""
        x = channels_last(x)
        options = {"eps": self.eps, "norm": arguments.norm, "backend": getattr(self, BACKEND)}
        return functional.layer_norm2d(x, *arguments.tensors, **options)


def is_downsampling(pair: nn.Sequential | nn.ModuleList) -> bool:
    """Whether the container is a downsampling layer: a norm and a convolution."""
    return len(pair) == 2 and hasattr(pair[0], "normalized_shape") and isinstance(pair[1], nn.Conv2d)


class DownsampleAdapter(Adapter):
    """A Sequential of a norm over channels and a KxK convolution with stride K, in one op."""

    kind = "downsampling"

    @classmethod
    def pair(cls, module: nn.Module) -> nn.Module:
        """Return the container of the two."""
        return module

    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Return why `norm` is not this library's norm over channels."""
        return structure.layer_norm(norm, cls.types["norm2d"], channels)

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return the parameters of both layers, or the first reason why the fused op cannot be used."""
        pair = cls.pair(module)
        if len(pair._modules) != 2:
            return f"its downsampling has {len(pair._modules)} layers"
        norm, conv = pair._modules.values()
        refusal = (
            structure.watched((pair, norm, conv) if pair is not module else (norm, conv))
            or structure.patch_conv(conv)
            or cls.norm_refusal(norm, conv.in_channels)
        )
        if refusal:
            return refusal
        affine = cls.affine(norm)
        if isinstance(affine, str):
            return affine
        tensors = (*affine[1], parameter(conv, "weight"), parameter(conv, "bias"))
        return Arguments(conv.in_channels, tensors, norm.eps, affine[0])

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Normalise and convolve; like the original's, the result is channels_last."""
        x = channels_last(x)
        options = {"eps": arguments.parts, "norm": arguments.norm, "backend": getattr(self, BACKEND)}
        return functional.patch_downsample(x, *arguments.tensors, **options)
