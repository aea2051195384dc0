"""Depthwise convolution of volumes (N, C, D, H, W): dwconv.py, which serves both."""

from convnext_kernels.backends.cpu.dwconv import backward, forward

__all__ = ["backward", "forward"]
