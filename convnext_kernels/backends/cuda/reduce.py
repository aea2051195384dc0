"""Second stage of every deterministic reduction: sum fp32 partial results over their first dimension, in a fixed order,
by csrc/cuda/reduce.cu.
"""

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import native

# More parts than this are summed in two stages, because a thread would have to add too many.
_PARTS = 1024


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (P, *shape) fp32, dense, over P; returns (*shape) in `dtype`. The same bits every time."""
    shape = partials.shape[1:]
    parts, length = partials.shape[0], shape.numel()
    while True:
        groups = 1 if parts <= _PARTS else -(-parts // _PARTS)
        out = torch.empty((groups, length), dtype=torch.float32 if groups > 1 else dtype, device=partials.device)
        tensors = native.address(partials), native.address(out), native.DTYPE_CODES[out.dtype]
        native.kernels().sum_partials(native.context(partials), *tensors, parts, length, groups)
        if groups == 1:
            return out.view(shape)
        partials, parts = out, groups
