"""The module that RepLKNet, UniRepLKNet and SLaK import (`convnext_kernels.compat`)."""

from convnext_kernels.compat import DepthWiseConv2dImplicitGEMM

__all__ = ["DepthWiseConv2dImplicitGEMM"]
