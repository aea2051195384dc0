"""Downsampling, `backends/gpu/downsample.py` with Triton's norms."""

import functools

from convnext_kernels.backends.gpu import downsample
from convnext_kernels.backends.triton import shared
from convnext_kernels.backends.triton.launch import prepared

forward = prepared(functools.partial(downsample.forward, shared))
backward = prepared(functools.partial(downsample.backward, shared))
