"""Large depthwise convolutions on their own: of InceptionNeXt, SegNeXt, VAN, RepLKNet, SLaK and others."""

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, Adapter, Arguments, Match
from convnext_kernels.interop.layers import channels_last
from convnext_kernels.interop.structure import parameter

LEAST = 7  # of the longer side. Faster than PyTorch where measured: docs/cpu_kernels.md; 3x3 and 5x5 stay PyTorch's

# Multiply-adds below which a CPU's inference in fp32 stays PyTorch's: the kernel gains 20 to 25 us on InceptionNeXt's
# 1x11 and 11x1, but after a layer that fills the caches the call from Python takes up to 170 us, PyTorch's 40.
FEW = 2**20


class DepthwiseAdapter(Adapter):
    """A depthwise ``torch.nn.Conv2d`` with a side of at least 7."""

    kind = "depthwise convolution"

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return weight and bias, or the reason: a padding that does not keep the size, a stride above 2."""
        refusal = structure.depthwise(module, strides=(1, 2))
        if refusal:
            return refusal
        return Arguments(module.in_channels, (parameter(module, "weight"), parameter(module, "bias")), None)

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Not what PyTorch computes before the op is reached."""
        if not super().serves(x, arguments):
            return False
        return (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or getattr(self, BACKEND) != "auto"
            or x.numel() * arguments.tensors[0][0].numel() >= FEW
            or structure.autocasting(x)
        )

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Convolve; the result is channels_last, and so are the layers after it.

        Some channels of a channels_last tensor, as InceptionNeXt's, are not copied here: a kernel may read them.
        """
        return functional.depthwise_conv2d(
            x if x.stride(1) == 1 else channels_last(x),
            *arguments.tensors,
            stride=self.stride[0],
            dilation=self.dilation,
            backend=getattr(self, BACKEND),
        )


def match(module: nn.Module) -> Match | None:
    """Match a large depthwise `torch.nn.Conv2d`, but no subclass."""
    if structure.class_of(module) is not nn.Conv2d or not 1 < module.in_channels == module.groups:
        return None
    return Match(DepthwiseAdapter, nn.Conv2d) if max(module.kernel_size) >= LEAST else None
