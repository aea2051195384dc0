"""Packed parameters, kept as long as the parameters they were made from, and made again when those change.

A change is seen by, for every parameter: its storage, shape and dtype (``.data`` swaps, ``load_state_dict(assign=)``,
moves), PyTorch's version counter (in-place operations, optimizers, ``load_state_dict``), and a checksum, because writes
through ``.data`` count no version. The checksum reads small tensors in full and 512 words spread over large ones, so
it sees every dense write (``p.data.mul_``, ``copy_``, ``clamp_``), but may miss a write of single elements of a large
matrix through ``.data``. Read in full are tensors without a version counter (created in inference mode), and all in a
process group: FSDP fills the buffers of its parameters at every pass and takes the version back. What is not dense is
packed anew at each call.

Entries belong to the storage of one parameter, the anchor, by a weak reference of PyTorch's own: a Python weak
reference to the parameter would make `torch.utils.swap_tensors` refuse it. Those of storages that are gone are dropped
when something new is packed.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convnext_kernels.backends.cpu import native

_lock = threading.Lock()
# (storage, offset, configuration) -> (the storage, state of all parameters, what was packed). The weak reference keeps
# the storage's address from being given to another one.
_entries: dict[tuple, tuple[StorageWeakRef, tuple, Any]] = {}


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _state(parameters: Sequence[Tensor | None]) -> tuple | None:
    """Everything that tells one content of the parameters from another; None if that cannot be known."""
    state: list[Any] = []
    regions = []
    in_full = torch.distributed.is_available() and torch.distributed.is_initialized()
    for t in parameters:
        if t is None:
            state.append(None)
            continue
        if not _dense(t):
            return None
        counted = not t.is_inference()
        state.append((t.data_ptr(), t.shape, t.dtype, t.stride(), t._version if counted else None))
        regions.append((t.data_ptr(), t.numel() * t.element_size(), in_full or not counted))
    state.append(native.extension().checksum(regions))
    return tuple(state)


def packed(
    anchor: Tensor, parameters: Sequence[Tensor | None], configuration: Hashable, pack: Callable[[], Any]
) -> Any:
    """Return what ``pack()`` made of `parameters` in their present state; kept as long as the anchor's storage."""
    state = _state(parameters)
    if state is None:
        return pack()
    storage = anchor.untyped_storage()
    key = (storage._cdata, anchor.storage_offset(), configuration)
    entry = _entries.get(key)
    if entry is not None and entry[1] == state:
        return entry[2]
    result = pack()
    with _lock:
        for dead in [k for k, (reference, _, _) in _entries.items() if reference.expired()]:
            del _entries[dead]
        _entries[key] = (StorageWeakRef(storage), state, result)
    return result
