"""Depthwise convolutions of volumes: `torch.nn.Conv3d` in MedNeXt's blocks, and wherever else they are."""

from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, Adapter, Arguments, Match
from convnext_kernels.interop.structure import parameter
from convnext_kernels.ops.checks import MAX_KERNEL_SIZE_3D


def channels_last_3d(x: Tensor) -> Tensor:
    """``x.contiguous(memory_format=torch.channels_last_3d)``, which vmap does not support."""
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


class DepthwiseConv3dAdapter(Adapter):
    """A depthwise convolution of volumes with an odd kernel, zero padding of K // 2, stride 1 or 2."""

    kind = "depthwise convolution"

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return weight, bias and stride, or the reason: another kernel, stride, dilation or padding."""
        sides, stride = module.kernel_size, module.stride[0]
        if any(side % 2 == 0 or side > MAX_KERNEL_SIZE_3D for side in sides):
            return f"the kernel size {sides} is not odd and at most {MAX_KERNEL_SIZE_3D}"
        if stride not in (1, 2) or any(step != stride for step in module.stride):
            return f"the depthwise convolution has stride {module.stride}"
        if any(step != 1 for step in module.dilation):
            return f"the depthwise convolution has dilation {module.dilation}"
        padding = tuple(side // 2 for side in sides)
        if module.padding not in (padding, "same") or (module.padding_mode != "zeros" and any(padding)):
            return f"the padding {module.padding}, {module.padding_mode!r} does not keep the size with zeros"
        return Arguments(module.in_channels, (parameter(module, "weight"), parameter(module, "bias")), stride)

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Volumes instead of images."""
        return structure.serves(x, arguments.channels, arguments.tensors, dimensions=5)

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Convolve; the result is channels_last_3d, and so are the layers after it."""
        stride, backend = arguments.parts, getattr(self, BACKEND)
        return functional.depthwise_conv3d(channels_last_3d(x), *arguments.tensors, stride=stride, backend=backend)


def match(module: nn.Module) -> Match | None:
    """Recognise depthwise convolutions of volumes."""
    if isinstance(module, nn.Conv3d) and 1 < module.groups == module.in_channels == module.out_channels:
        return Match(DepthwiseConv3dAdapter, nn.Conv3d)
    return None
