"""Fused kernels for modern ConvNets: depthwise convolution and the ConvNeXt inverted bottleneck."""

import types
import warnings

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):  # before what an older one does not have
    raise ImportError(f"convnext_kernels needs PyTorch 2.6 or newer, this is {torch.__version__}")

from convnext_kernels import backends, dispatch, functional
from convnext_kernels.dispatch import list_backends, use_backend
from convnext_kernels.exporting import keep_ops
from convnext_kernels.graphs import graphed
from convnext_kernels.interop import accelerate, acceleration_report, restore
from convnext_kernels.nn import (
    DepthwiseConv2d,
    FusedConvNeXtBlock,
    FusedConvNeXtBlock1d,
    GlobalResponseNorm,
    LayerNorm2d,
)
from convnext_kernels.ops.registration import inline_kernels
from convnext_kernels.spec import BackendError
from convnext_kernels.tuning.tune import tune
from convnext_kernels.version import __version__

__all__ = [
    "BackendError",
    "DepthwiseConv2d",
    "FusedConvNeXtBlock",
    "FusedConvNeXtBlock1d",
    "GlobalResponseNorm",
    "LayerNorm2d",
    "__version__",
    "accelerate",
    "acceleration_report",
    "functional",
    "graphed",
    "inline_kernels",
    "keep_ops",
    "list_backends",
    "restore",
    "tune",
    "use_backend",
]


class _CallableModule(types.ModuleType):
    """The subpackage `backends`, which can still be called: `list_backends` had its name before."""

    def __call__(self) -> dict[str, dispatch.BackendStatus]:
        """Deprecated: `list_backends`."""
        message = "convnext_kernels.backends() is deprecated, call convnext_kernels.list_backends() instead"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return list_backends()


# The attribute `backends` of this package is the subpackage, so the old function can only live on in its class.
backends.__class__ = _CallableModule
