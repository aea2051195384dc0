"""Downsampling, `backends/gpu/downsample.py` with the CUDA kernels' norms."""

import functools

from convnext_kernels.backends.cuda.native import prepared
from convnext_kernels.backends.cuda.shared import KERNELS
from convnext_kernels.backends.gpu import downsample

forward = prepared(functools.partial(downsample.forward, KERNELS))
backward = prepared(functools.partial(downsample.backward, KERNELS))
