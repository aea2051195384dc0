"""Downsampling, `backends/gpu/downsample.py` with the CUDA kernels' norms."""

import functools

from convnext_kernels.backends.cuda import shared
from convnext_kernels.backends.cuda.native import prepared
from convnext_kernels.backends.gpu import downsample

forward = prepared(functools.partial(downsample.forward, shared))
backward = prepared(functools.partial(downsample.backward, shared))
