"""Packed parameters, kept as long as the parameters they were made from, and made again when those change.

A change is seen by, for every parameter: its address, shape and dtype (``.data`` swaps, ``load_state_dict(assign=)``,
moves), PyTorch's version counter (in-place operations, optimizers, ``load_state_dict``), and a checksum, because writes
through ``.data`` count no version. The checksum reads small tensors in full and 512 words spread over large ones, so it
sees every dense write (``p.data.mul_``, ``copy_``, ``clamp_``), but may miss a write of single elements of a large matrix
through ``.data``. Tensors without a version counter (created in inference mode) are read in full, and what is
not dense is packed anew at each call.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from convnext_kernels.backends.cpu import native

_lock = threading.Lock()
# (id of the anchor, configuration) -> (the anchor, state of all parameters, what was packed)
_entries: dict[tuple[int, Hashable], tuple[weakref.ref, tuple, Any]] = {}


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _state(parameters: Sequence[Tensor | None]) -> tuple | None:
    """Everything that tells one content of the parameters from another; None if that cannot be known."""
    state: list[Any] = []
    regions = []
    for t in parameters:
        if t is None:
            state.append(None)
            continue
        if not _dense(t):
            return None
        counted = not t.is_inference()
        state.append((t.data_ptr(), t.shape, t.dtype, t.stride(), t._version if counted else None))
        regions.append((t.data_ptr(), t.numel() * t.element_size(), not counted))
    state.append(native.extension().checksum(regions))
    return tuple(state)


def _forget(key: tuple[int, Hashable], anchor: weakref.ref) -> None:
    with _lock:
        entry = _entries.get(key)
        if entry is not None and entry[0] is anchor:
            del _entries[key]


def packed(anchor: Tensor, parameters: Sequence[Tensor | None], configuration: Hashable, pack: Callable[[], Any]) -> Any:
    """Return what ``pack()`` made of `parameters` in their present state; the result lives as long as `anchor`."""
    state = _state(parameters)
    if state is None:
        return pack()
    key = (id(anchor), configuration)
    entry = _entries.get(key)
    if entry is not None and entry[0]() is anchor and entry[1] == state:
        return entry[2]
    result = pack()
    reference = weakref.ref(anchor, lambda dead: _forget(key, dead))
    with _lock:
        _entries[key] = (reference, state, result)
    return result
