"""Packed parameters, kept as long as the parameters they were made from, and made again when those change.

A change is seen by, for every parameter: its storage, shape and dtype (``.data`` swaps, ``load_state_dict(assign=)``,
moves), PyTorch's version counter (in-place operations, optimizers, ``load_state_dict``), and a checksum, because writes
through ``.data`` count no version. The checksum reads small tensors in full and 64 lines of 64 bytes spread over large
ones, so it sees every dense write (``p.data.mul_``, ``copy_``, ``clamp_``), but may miss a write of a few rows or
elements of a large matrix through ``.data``. Read in full are tensors without a version counter (created in inference
mode), and all in a process group: FSDP fills the buffers of its parameters at every pass and takes the version back.
What is not dense is packed anew at each call.

Entries belong to the storage of one parameter, the anchor, by a weak reference of PyTorch's own: a Python weak
reference to the parameter would make `torch.utils.swap_tensors` refuse it. Those of storages that are gone are dropped
when something new is packed.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convnext_kernels.backends.cpu import native


class _Entry(NamedTuple):
    reference: StorageWeakRef  # keeps the storage's address from being given to another one
    facts: tuple  # `_facts` of all parameters
    regions: list[tuple[int, int, bool]]  # what the checksum reads: address, bytes, whether all of them
    checksum: int
    result: Any


_lock = threading.Lock()
_entries: dict[tuple, _Entry] = {}  # by (storage, offset, configuration)


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _facts(parameters: Sequence[Tensor | None], in_full: bool) -> tuple:
    """All that PyTorch knows of the parameters that tells one content from another."""
    return in_full, *(
        None if t is None else (t.data_ptr(), t.shape, t.dtype, t.stride(), None if t.is_inference() else t._version)
        for t in parameters
    )


def _regions(parameters: Sequence[Tensor | None], in_full: bool) -> list[tuple[int, int, bool]] | None:
    """What the checksum reads; None if a parameter is not dense."""
    found = []
    for t in parameters:
        if t is None:
            continue
        if not _dense(t):
            return None
        found.append((t.data_ptr(), t.numel() * t.element_size(), in_full or t.is_inference()))
    return found


def packed(
    anchor: Tensor, parameters: Sequence[Tensor | None], configuration: Hashable, pack: Callable[[], Any]
) -> Any:
    """Return what ``pack()`` made of `parameters` in their present state; kept as long as the anchor's storage."""
    in_full = torch.distributed.is_available() and torch.distributed.is_initialized()
    facts = _facts(parameters, in_full)
    storage = anchor.untyped_storage()
    key = (storage._cdata, anchor.storage_offset(), configuration)
    entry = _entries.get(key)
    checksum = native.extension().checksum
    if entry is not None and entry.facts == facts and checksum(entry.regions) == entry.checksum:
        return entry.result
    regions = _regions(parameters, in_full)
    if regions is None:
        return pack()
    found = checksum(regions)  # before packing: a change in between is seen by the next call
    result = pack()
    with _lock:
        for dead in [k for k, other in _entries.items() if other.reference.expired()]:
            del _entries[dead]
        _entries[key] = _Entry(StorageWeakRef(storage), facts, regions, found, result)
    return result
