"""Second stage of every deterministic reduction: sum fp32 partial results over their first dimension, in one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sum_partials_kernel(partials_ptr, out_ptr, parts, length, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    """out[l] = sum_p partials[p, l]; one program per BLOCK_L columns, so that the order never changes."""
    columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = columns < length
    acc = tl.zeros((BLOCK_P, BLOCK_L), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        pointers = partials_ptr + rows[:, None].to(tl.int64) * length + columns[None, :]
        acc += tl.load(pointers, mask=(rows < parts)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + columns, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (P, *shape) fp32 over P; returns (*shape) in `dtype`. One launch, bitwise the same every time."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    length = out.numel()
    # 32 lanes read one 128-byte line; 4 warps take 4 (of 8) rows at a time
    block_l = 64
    sum_partials_kernel[(triton.cdiv(length, block_l),)](
        partials, out, partials.shape[0], length, BLOCK_P=8, BLOCK_L=block_l, num_warps=4
    )
    return out
