"""Second stage of every deterministic reduction: sum fp32 partial results over the first dimension, in fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.backends.triton.launch import launch

# A program sums at most so many rows, 32 at a time: 8 dependent steps. More rows are summed in two stages.
_ROWS = 256
_ELEMENTS = 1024  # of a step: 8 loads per thread


def block(rows: int) -> dict[str, int]:
    """The tile of one step over `rows` rows: not higher than needed, not narrower than a 128-byte line."""
    block_p = min(32, max(8, triton.next_power_of_2(rows)))
    return {"BLOCK_P": block_p, "BLOCK_L": _ELEMENTS // block_p}


@triton.jit(do_not_specialize=["parts", "rows"])
def sum_partials_kernel(partials_ptr, out_ptr, parts, rows, length, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    """out[g, l] = sum of partials[p, l] over p in [g * rows, (g + 1) * rows); one program per BLOCK_L columns."""
    columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = columns < length
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, parts)
    acc = tl.zeros((BLOCK_P, BLOCK_L), dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        pointers = partials_ptr + p[:, None].to(tl.int64) * length + columns[None, :]
        acc += tl.load(pointers, mask=(p < end)[:, None] & inside[None, :], other=0.0)
    where = out_ptr + tl.program_id(1).to(tl.int64) * length + columns
    tl.store(where, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (P, *shape) fp32, dense, over P; returns (*shape) in `dtype`. One launch, two above 256 rows; the same bits
    every time.
    """
    shape = partials.shape[1:]
    parts, length = partials.shape[0], shape.numel()
    while True:
        groups = 1 if parts <= _ROWS else triton.cdiv(parts, _ROWS)
        out = torch.empty((groups, length), dtype=torch.float32 if groups > 1 else dtype, device=partials.device)
        count = triton.cdiv(parts, groups)
        config = block(count)
        launch(sum_partials_kernel, (triton.cdiv(length, config["BLOCK_L"]), groups))(
            partials, out, parts, count, length, **config, num_warps=4, enable_fp_fusion=True
        )
        if groups == 1:
            return out.view(shape)
        partials, parts = out, groups
