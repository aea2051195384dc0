"""The ConvNeXt block and its layers as modules."""

from convnext_kernels.nn.block import FusedConvNeXtBlock
from convnext_kernels.nn.block1d import DepthwiseConv1d, FusedConvNeXtBlock1d
from convnext_kernels.nn.layers import (
    DepthwiseConv2d,
    DepthwiseConv3d,
    DropPath,
    GlobalResponseNorm,
    LayerNorm2d,
    PatchDownsample2d,
)
from convnext_kernels.nn.sequential import FusedSequential

__all__ = [
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv3d",
    "DropPath",
    "FusedConvNeXtBlock",
    "FusedConvNeXtBlock1d",
    "FusedSequential",
    "GlobalResponseNorm",
    "LayerNorm2d",
    "PatchDownsample2d",
]
