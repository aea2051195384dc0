"""The ConvNeXt block: backends/gpu/block.py with this backend's dwconv and mlp."""

import functools

from convnext_kernels.backends.cuda import dwconv, mlp
from convnext_kernels.backends.cuda.native import prepared
from convnext_kernels.backends.gpu import block

KEEPS_HIDDEN = True
KEEPS_ROUNDED = True

_forward = functools.partial(block.forward, dwconv, mlp)
forward = prepared(_forward)
sequence = prepared(functools.partial(block.sequence, _forward))
backward = prepared(functools.partial(block.backward, dwconv, mlp))
