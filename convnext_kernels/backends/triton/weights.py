"""Both pointwise weights in the dtype of the matmuls, which are kept from one call to the next.

Under autocast fp32 parameters are rounded: 6 bytes per weight, more than a small batch moves otherwise. The rounded
copies stay in memory, and one launch per call writes them where they are old. Changes are seen in two ways:

- by PyTorch's version counters (in-place operations, optimizers, ``load_state_dict``): the host clears the stamps;
- by a checksum of 32 lines of 64 bytes of each weight, which every program computes on the device: so dense writes
  through ``.data`` and by kernels that PyTorch does not know are seen, and the host does not wait for the GPU.

A program writes its block of the copies if the block's stamp is not the checksum. So all blocks decide alike, and no
program reads what another one writes. As on the CPU (`backends/cpu/packed.py`) a write of a few rows or elements of a
large matrix through ``.data`` may be missed.

The copies are written in full, to other memory, while a CUDA graph is captured (its replays see no versions), for
weights without a version (made in inference mode), and in a process group (FSDP resets versions).

Copies belong to the storages of both weights and are let go after them, when others are made. They are used on one
stream: a call on another stream makes new ones, which replace them.
"""

import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convnext_kernels import exporting
from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu import prepared as programs
from convnext_kernels.backends.triton.kernels.dependent import wait_for_previous
from convnext_kernels.backends.triton.launch import launch
from convnext_kernels.calls import MlpCall

BLOCK = 16384  # weights of a program
_DISTRIBUTED = torch.distributed.is_available()
_lock = threading.Lock()


class _Entry(NamedTuple):
    storages: tuple[StorageWeakRef, StorageWeakRef]  # while they exist, no other storage has their ids
    stream: int
    memory: Tensor
    versions: list[int]


_entries: dict[tuple, _Entry] = {}


@triton.jit
def _hashes(w_ptr, size, i, seed):
    """Of 32 lines of 16 weights, which i counts: 32 bits each, that depend on the place."""
    where = (i // 16) * (size // 32) + i % 16
    bits = tl.load(w_ptr + where, mask=where < size, other=0.0).to(tl.int32, bitcast=True)
    product = (bits ^ (i * 2654435 + seed)).to(tl.int64) * 1481765933
    return (product ^ (product >> 32)) & 0xFFFFFFFF


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
    """Round both weights; a program does nothing if its stamp is their checksum."""
    wait_for_previous(PDL)
    stamp_ptr = stamps_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + tl.program_id(0)
    before = tl.load(stamp_ptr)
    i = tl.arange(0, 512)
    hashes = _hashes(w1_ptr, size, i, 0) + _hashes(w2_ptr, size, i, 1 << 30)
    # The checksum is at least 1: a stamp of 0 is none. All warps take the difference from one sum, so none of them
    # reads a stamp that another one has written already.
    change = tl.sum(hashes + tl.where(i == 0, 1 - before, 0))
    if change != 0:
        for start in range(0, BLOCK, 4096):
            at = tl.program_id(0) * BLOCK + start + tl.arange(0, 4096)
            first = tl.load(w1_ptr + at, mask=at < size, other=0.0)
            second = tl.load(w2_ptr + (at - size), mask=(at >= size) & (at < 2 * size), other=0.0)
            w = tl.where(at < size, first, second).to(cast_ptr.dtype.element_ty)
            tl.store(cast_ptr + at, w, mask=at < 2 * size)
        tl.store(stamp_ptr, before + change)


def _capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _in_process_group() -> bool:
    return _DISTRIBUTED and torch.distributed.is_initialized()


def _memory(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Memory for copies of two weights like this one, and where its stamps begin: 4 elements each."""
    begin = triton.cdiv(2 * like.numel(), 8) * 8
    length = begin + 4 * triton.cdiv(2 * like.numel(), BLOCK)
    return torch.empty(length, dtype=dtype, device=like.device), begin


def kept(w1: Tensor, w2: Tensor, dtype: torch.dtype, begin: int, stream: int | None = None) -> Tensor:
    """The memory of the copies of w1 and w2 in `dtype`; stamps, from `begin` on, are 0 where copies may be old.

    `stream`: of the call, or None if the memory must not be kept.
    """
    try:
        versions = [w1._version, w2._version]
    except RuntimeError:  # made in inference mode
        stream = None
    if stream is None or _capturing(w1) or _in_process_group():
        memory, _ = _memory(w1, dtype)
        memory[begin:].zero_()
        return memory
    first, second = w1.untyped_storage(), w2.untyped_storage()
    key = (first._cdata, second._cdata, w1.data_ptr(), w2.data_ptr(), begin, dtype)
    entry = _entries.get(key)
    if entry is None or entry.stream != stream:
        with torch.inference_mode(False):  # it may be written outside of that mode, too
            memory, _ = _memory(w1, dtype)
        entry = _Entry((StorageWeakRef(first), StorageWeakRef(second)), stream, memory, [])
        with _lock:
            for dead in [k for k, other in _entries.items() if any(s.expired() for s in other.storages)]:
                del _entries[dead]
            _entries[key] = entry
    if entry.versions != versions:
        entry.memory[begin:].zero_()
        entry.versions[:] = versions
    return entry.memory


def matrices(call: MlpCall) -> tuple[Tensor, Tensor]:
    """`mlp_cublas.matrices` of a call without gradients, from kept copies where dense fp32 weights are rounded."""
    w1, w2 = weights = call.p.pwconv1_weight, call.p.pwconv2_weight
    dtype, size = call.compute_dtype, w1.numel()
    dense = all(w.dtype == torch.float32 and w.is_contiguous() for w in weights)
    if not dense or dtype.itemsize != 2 or exporting.traces_launches():
        return mlp_cublas.matrices(call)
    recorder = programs.recorder()
    memory, begin = _memory(w1, dtype)
    if recorder is None:
        memory = kept(w1, w2, dtype, begin)
    else:
        recorder.given_by(memory, kept, w1, w2, dtype, begin)
    launch(cast_kernel, (triton.cdiv(2 * size, BLOCK),))(
        w1, w2, memory, memory[begin:], size, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return memory[:size].view(w1.shape[:2]), memory[size : 2 * size].view(w2.shape[:2])
