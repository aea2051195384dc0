"""Downsampling, `backends/gpu/downsample.py` with Triton's LayerNorm."""

import functools

from convnext_kernels.backends.gpu import downsample
from convnext_kernels.backends.triton.shared import KERNELS

forward = functools.partial(downsample.forward, KERNELS)
backward = functools.partial(downsample.backward, KERNELS)
