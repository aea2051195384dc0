"""Copies of the pointwise weights that are kept from one call to the next: rounded, or with LayerNorm folded in.

Under autocast fp32 parameters are rounded: 6 bytes per weight, more than a small batch moves otherwise. Where LayerNorm
is folded into the expand product, W1 * weight is written: 4 bytes per weight of W1 in 16 bits. The copies stay in
memory, and one launch per call writes them where they are old. Changes are seen in two ways:

- by PyTorch's version counters (in-place operations, optimizers, ``load_state_dict``): the host clears the stamps;
- by a checksum of 32 lines of each weight, and of all of the norm's parameters and of b1, which every program computes
  on the device (mlp_weights.py): so dense writes through ``.data`` and by kernels that PyTorch does not know are seen,
  and the host does not wait for the GPU.

As on the CPU (`backends/cpu/packed.py`) a write of a few rows or elements of a large matrix through ``.data`` may be
missed.

The copies are written in full, to other memory, while a CUDA graph is captured (its replays see no versions), for
weights without a version (made in inference mode), and in a process group (FSDP resets versions).

Copies belong to the storages of their parameters and are let go after them, when others are made. They are used on one
stream: a call on another stream makes new ones, which replace them.
"""

import threading
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convnext_kernels import exporting
from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu import prepared as programs
from convnext_kernels.backends.gpu.layout import flat, vector
from convnext_kernels.backends.triton.kernels.mlp_weights import cast_kernel, fold_kernel
from convnext_kernels.backends.triton.launch import launch
from convnext_kernels.backends.triton.plans.mlp_plan import FOLD_ROWS
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters

BLOCK = 16384  # weights of a program of `cast_kernel`
_DISTRIBUTED = torch.distributed.is_available()
_lock = threading.Lock()


class _Entry(NamedTuple):
    storages: list[StorageWeakRef]  # while they exist, no other storage has their ids
    stream: int
    memory: Tensor
    versions: list[int]


_entries: dict[tuple, _Entry] = {}


def _capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _in_process_group() -> bool:
    return _DISTRIBUTED and torch.distributed.is_initialized()


def kept(length: int, begin: int, dtype: torch.dtype, *sources: Tensor, stream: int | None = None) -> Tensor:
    """Memory for copies of `sources`, `length` elements; stamps, from `begin` on, are 0 where copies may be old.

    `stream`: of the call, or None if the memory must not be kept.
    """
    like = sources[0]
    try:
        versions = [source._version for source in sources]
    except RuntimeError:  # made in inference mode
        stream = None
    if stream is None or _capturing(like) or _in_process_group():
        memory = torch.empty(length, dtype=dtype, device=like.device)
        memory[begin:].zero_()
        return memory
    storages = [source.untyped_storage() for source in sources]
    key = (*[s._cdata for s in storages], *[source.data_ptr() for source in sources], begin, dtype)
    entry = _entries.get(key)
    if entry is None or entry.stream != stream:
        with torch.inference_mode(False):  # it may be written outside of that mode, too
            memory = torch.empty(length, dtype=dtype, device=like.device)
        entry = _Entry([StorageWeakRef(s) for s in storages], stream, memory, [])
        with _lock:
            for dead in [k for k, other in _entries.items() if any(s.expired() for s in other.storages)]:
                del _entries[dead]
            _entries[key] = entry
    if entry.versions != versions:
        entry.memory[begin:].zero_()
        entry.versions[:] = versions
    return entry.memory


def _memory(copies: int, programs_: int, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, Tensor]:
    """`kept` memory for `copies` elements of `dtype`, and the stamps of so many programs after them."""
    begin = _aligned(copies)
    length = begin + 8 // dtype.itemsize * programs_
    recorder = programs.recorder()
    if recorder is None:
        memory = kept(length, begin, dtype, *sources)
    else:
        memory = torch.empty(length, dtype=dtype, device=sources[0].device)
        recorder.given_by(memory, kept, length, begin, dtype, *sources)
    return memory, memory[begin:].view(torch.int64)


def _aligned(elements: int) -> int:
    return triton.cdiv(elements, 8) * 8


def matrices(call: MlpCall) -> tuple[Tensor, Tensor]:
    """`mlp_cublas.matrices` of a call without gradients, from kept copies where dense fp32 weights are rounded."""
    w1, w2 = weights = call.p.pwconv1_weight, call.p.pwconv2_weight
    dtype, size = call.compute_dtype, w1.numel()
    dense = all(w.dtype == torch.float32 and w.is_contiguous() for w in weights)
    if not dense or dtype.itemsize != 2 or exporting.traces_launches():
        return mlp_cublas.matrices(call)
    blocks = triton.cdiv(2 * size, BLOCK)
    memory, stamps = _memory(2 * size, blocks, dtype, w1, w2)
    launch(cast_kernel, (blocks,))(w1, w2, memory, stamps, size, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
    return memory[:size].view(w1.shape[:2]), memory[size : 2 * size].view(w2.shape[:2])


def folded(p: MlpParameters, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    """W1 * weight in `dtype`, (hidden, C), and in fp32, (2, hidden), the sums of its rows and b1 + W1 bias.

    They are made from the parameters themselves. `keep`: for later calls.
    """
    hidden, channels = p.pwconv1_weight.shape[:2]
    size, blocks = hidden * channels, triton.cdiv(hidden, FOLD_ROWS)
    if keep and not exporting.traces_launches():
        sources = p.pwconv1_weight, p.norm_weight, p.norm_bias, p.pwconv1_bias
        begin, sums = _aligned(size), 2 * hidden * 4 // dtype.itemsize
        memory, stamps = _memory(begin + sums, blocks, dtype, *(s for s in sources if s is not None))
        product = memory[:size].view(hidden, channels)
        columns = memory[begin : begin + sums].view(torch.float32).view(2, hidden)
    else:
        product = torch.empty((hidden, channels), dtype=dtype, device=p.pwconv1_weight.device)
        columns = torch.empty((2, hidden), dtype=torch.float32, device=product.device)
        stamps = None
    launch(fold_kernel, (blocks,))(
        flat(p.pwconv1_weight),
        flat(p.norm_weight),
        vector(p.norm_bias),
        vector(p.pwconv1_bias),
        product,
        columns,
        stamps,
        C=channels,
        HIDDEN=hidden,
        BLOCK_H=FOLD_ROWS,
        BLOCK_C=128,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return product, columns
