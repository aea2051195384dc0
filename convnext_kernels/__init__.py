"""Fused kernels for modern ConvNets: depthwise convolution and the ConvNeXt inverted bottleneck."""

from convnext_kernels import functional
from convnext_kernels.interop import accelerate, acceleration_report, restore
from convnext_kernels.nn import DepthwiseConv2d, FusedConvNeXtBlock, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.planner import backends, use_backend
from convnext_kernels.spec import BackendError
from convnext_kernels.tuning.autotune import autotune
from convnext_kernels.version import __version__

__all__ = [
    "BackendError",
    "DepthwiseConv2d",
    "FusedConvNeXtBlock",
    "GlobalResponseNorm",
    "LayerNorm2d",
    "__version__",
    "accelerate",
    "acceleration_report",
    "autotune",
    "backends",
    "functional",
    "restore",
    "use_backend",
]
