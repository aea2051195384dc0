"""Copies of the pointwise weights: rounded, or with LayerNorm's parameters folded in. weights.py keeps them.

A program has a stamp, the checksum of what its copies were made from. It reads samples of large parameters and all of
small ones, and writes its block of the copies only if the checksum is not the stamp. No program reads what another
one writes.
"""

# Inside kernels, conditions at compile time only plain ifs.
# ruff: noqa: SIM108

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.kernels.mlp_tiles import load_vector

SAMPLED = tl.constexpr(512)  # elements of a large parameter: 32 lines of 16


@triton.jit
def _hashes(w_ptr, where, inside, i, seed):
    """32 bits for each element, which depend on its number `i`, too."""
    w = tl.load(w_ptr + where, mask=inside, other=0.0)
    if w.dtype == tl.float32:
        bits = w.to(tl.int32, bitcast=True)
    else:
        bits = w.to(tl.int16, bitcast=True).to(tl.int32)
    product = (bits ^ (i * 2654435 + seed)).to(tl.int64) * 1481765933
    return (product ^ (product >> 32)) & 0xFFFFFFFF


@triton.jit
def _sample(w_ptr, size, i, seed):
    """`_hashes` of 32 lines of a parameter, which i counts."""
    where = (i // 16) * (size // 32) + i % 16
    return _hashes(w_ptr, where, where < size, i, seed)


@triton.jit
def _change(hashes, before, i):
    """The checksum of which these are the parts, minus the stamp `before`.

    The checksum is at least 1: a stamp of 0 is none. All warps take the difference from one sum, so none of them
    reads a stamp that another one has written already.
    """
    return tl.sum(hashes + tl.where(i == 0, 1 - before, 0))


@triton.jit
def cast_kernel(
    w1_ptr,  # fp32, dense
    w2_ptr,
    cast_ptr,  # both, one after the other, in the dtype of the matmuls
    stamps_ptr,  # int64, one for each program
    size,  # of one weight
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Round both weights; one program: BLOCK weights."""
    wait_for_previous(PDL)
    before = tl.load(stamps_ptr + tl.program_id(0))
    i = tl.arange(0, SAMPLED)
    change = _change(_sample(w1_ptr, size, i, 0) + _sample(w2_ptr, size, i, 1 << 30), before, i)
    if change != 0:
        for start in range(0, BLOCK, 4096):
            at = tl.program_id(0) * BLOCK + start + tl.arange(0, 4096)
            first = tl.load(w1_ptr + at, mask=at < size, other=0.0)
            second = tl.load(w2_ptr + (at - size), mask=(at >= size) & (at < 2 * size), other=0.0)
            w = tl.where(at < size, first, second).to(cast_ptr.dtype.element_ty)
            tl.store(cast_ptr + at, w, mask=at < 2 * size)
        tl.store(stamps_ptr + tl.program_id(0), before + change)


@triton.jit
def fold_kernel(
    w1_ptr,  # (HIDDEN, C) dense, a parameter
    norm_weight_ptr,
    norm_bias_ptr,
    b1_ptr,
    folded_ptr,  # (HIDDEN, C): W1 * weight in the dtype of the matmuls
    columns_ptr,  # (2, HIDDEN) fp32: the sums of the rounded W1 * weight, and b1 + W1 bias
    stamps_ptr,  # int64, one for each program; None: always write
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """The norm's parameters in W1 and b1; one program: BLOCK_H rows of W1."""
    wait_for_previous(PDL)
    before = 0
    change = 1
    if stamps_ptr is not None:
        before = tl.load(stamps_ptr + tl.program_id(0))
        i = tl.arange(0, SAMPLED)
        hashes = _sample(w1_ptr, HIDDEN * C, i, 0)
        for start in range(0, C, SAMPLED):
            column = start + i
            hashes += _hashes(norm_weight_ptr, column, column < C, column, 1 << 29)
            if norm_bias_ptr is not None:
                hashes += _hashes(norm_bias_ptr, column, column < C, column, 1 << 30)
        if b1_ptr is not None:
            own = tl.program_id(0) * BLOCK_H + i
            hashes += _hashes(b1_ptr, own, (i < BLOCK_H) & (own < HIDDEN), i, 3 << 29)
        change = _change(hashes, before, i)
    if change != 0:
        hid = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        held = hid < HIDDEN
        total = tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32)
        shift = tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            where = hid[:, None] * C + c[None, :]
            mask = held[:, None] & (c < C)[None, :]
            w = tl.load(w1_ptr + where, mask=mask, other=0.0).to(tl.float32)
            folded = (w * load_vector(norm_weight_ptr, c, c < C)[None, :]).to(folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + where, folded, mask=mask)
            total += folded.to(tl.float32)
            if norm_bias_ptr is not None:
                shift += w * load_vector(norm_bias_ptr, c, c < C)[None, :]
        tl.store(columns_ptr + hid, tl.sum(total, axis=1), mask=held)
        bias = tl.sum(shift, axis=1)
        if b1_ptr is not None:
            bias += load_vector(b1_ptr, hid, held)
        tl.store(columns_ptr + HIDDEN + hid, bias, mask=held)
        if stamps_ptr is not None:
            tl.store(stamps_ptr + tl.program_id(0), before + change)
