"""The ConvNeXt block: backends/gpu/block.py with this backend's dwconv and mlp."""

import functools

from convnext_kernels.backends.gpu import block
from convnext_kernels.backends.triton import dwconv, mlp
from convnext_kernels.backends.triton.launch import prepared

KEEPS_HIDDEN = True
KEEPS_ROUNDED = True

forward = prepared(functools.partial(block.forward, dwconv, mlp))
sequence = prepared(functools.partial(block.sequence, dwconv, mlp))
backward = prepared(functools.partial(block.backward, dwconv, mlp))
