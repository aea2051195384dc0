"""Downsampling, `backends/gpu/downsample.py` with Triton's norms."""

import functools

from convnext_kernels.backends.gpu import downsample
from convnext_kernels.backends.triton.launch import prepared
from convnext_kernels.backends.triton.shared import KERNELS

forward = prepared(functools.partial(downsample.forward, KERNELS))
backward = prepared(functools.partial(downsample.backward, KERNELS))
