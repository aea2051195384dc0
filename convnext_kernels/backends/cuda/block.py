"""The ConvNeXt block, by this backend's convolution and bottleneck: backends/gpu/block.py."""

import functools

from convnext_kernels.backends.cuda import dwconv, mlp
from convnext_kernels.backends.gpu import block

KEEPS_HIDDEN = True

forward = functools.partial(block.forward, dwconv, mlp)
backward = functools.partial(block.backward, dwconv, mlp)
