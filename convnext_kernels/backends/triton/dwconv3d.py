"""Depthwise convolution of volumes (N, C, D, H, W): dwconv.py, which serves both."""

from convnext_kernels.backends.triton import dwconv3d_transposed as transposed
from convnext_kernels.backends.triton.dwconv import backward, forward

__all__ = ["backward", "forward", "transposed"]
