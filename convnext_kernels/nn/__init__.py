"""The ConvNeXt block and its layers as modules."""

from convnext_kernels.nn.block import FusedConvNeXtBlock
from convnext_kernels.nn.layers import (
    DepthwiseConv2d,
    DropPath,
    GlobalResponseNorm,
    LayerNorm2d,
    PatchDownsample2d,
    StridedDepthwiseConv2d,
)
from convnext_kernels.nn.sequential import FusedSequential

__all__ = [
    "DepthwiseConv2d",
    "DropPath",
    "FusedConvNeXtBlock",
    "FusedSequential",
    "GlobalResponseNorm",
    "LayerNorm2d",
    "PatchDownsample2d",
    "StridedDepthwiseConv2d",
]
