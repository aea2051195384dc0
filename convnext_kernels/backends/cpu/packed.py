"""Packed parameters. They are kept as long as the original parameters exist, and packed again when these change.

A change is detected by three properties of every parameter:

- storage, shape and dtype, which change with ``.data`` swaps, ``load_state_dict(assign=True)`` and moves;
- PyTorch's version counter: in-place operations, optimizers, ``load_state_dict``;
- a checksum, because writes through ``.data`` do not change the version.

The checksum reads small tensors in full and of large tensors 32 lines of 64 bytes. It detects every dense write
(``p.data.mul_``, ``copy_``, ``clamp_``), but may miss a write of a few rows or elements of a large matrix through
``.data``, or in place to a parameter that was created in inference mode: such tensors have no version counter (to read
all of them in full made a block of C 768 at batch 1 take 1.5 times as long). In a process group it reads all tensors in
full: FSDP fills the buffers of its parameters at every pass and resets the version. Parameters that are not dense are
packed at every call.

Entries belong to the storage of one parameter, the anchor, through PyTorch's own kind of weak reference: with a Python
weak reference to the parameter, `torch.utils.swap_tensors` would refuse it. Entries of freed storages are removed when
something new is packed.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from convnext_kernels import calls, torch_versions
from convnext_kernels.backends.cpu import native
from convnext_kernels.calls import Repeated, Signature


class _Entry:
    __slots__ = ("__weakref__", "checksum", "facts", "last", "reference", "regions", "result")

    reference: StorageWeakRef  # while it exists, no other storage gets this address
    facts: tuple  # `_facts` of all parameters
    regions: Any  # for the checksum
    checksum: int
    result: Any
    last: tuple | None  # `Known.seen` of the last call that had these facts


VARIANTS = 4  # Vocos has as many conditions

_DISTRIBUTED = torch.distributed.is_available()
_lock = threading.Lock()
_entries: dict[tuple, _Entry] = {}  # by (storage, offset, configuration, variant), the oldest first


class Known(NamedTuple):
    """The parameters of a call whose signature has their shapes and dtypes, without those that are None."""

    signature: Signature
    tensors: list[Tensor]
    addresses: list[int]

    def seen(self, in_full: bool) -> tuple:
        """What `_facts` depends on, in a third of the time."""
        return self.signature, in_full, self.addresses, _versions(self.tensors)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _versions(tensors: list[Tensor]) -> list[int | None]:
    if not tensors[0].is_inference():  # an exception takes 10 us
        try:
            return [t._version for t in tensors]
        except RuntimeError:  # others were made in inference mode
            pass
    return [_version(t) for t in tensors]


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _facts(parameters: Sequence[Tensor | None], in_full: bool) -> tuple:
    """The properties of the parameters that show a change, except for the checksum."""
    return in_full, *(
        None if t is None else (t.data_ptr(), t.shape, t.dtype, t.stride(), _version(t)) for t in parameters
    )


def _regions(parameters: Sequence[Tensor | None], in_full: bool) -> Any:
    """The memory that the checksum reads; None if a parameter is not dense."""
    found = []
    for t in parameters:
        if t is None:
            continue
        if not _dense(t):
            return None
        found.append((t.data_ptr(), t.numel() * t.element_size(), in_full))
    return native.extension().Regions(found)


class Launch(NamedTuple):
    """How calls like one of an op are computed while the packed parameters are what they are."""

    repeated: Repeated
    bind: Callable[[Any], Any]  # packed parameters -> the extension's Launch
    out: Tensor  # like what they return
    between: bool = False  # whether the launch needs memory like `out` for itself


calls.SETTINGS.append(native.forced_isa)


def _repeats() -> Any:
    """The extension's table of calls, which from now on serves those that are like one of its own."""
    if calls.repeat is calls.never:
        of_tensors = torch_versions.data_ptr, torch_versions.version, torch_versions.empty_strided_cpu
        calls.repeat = native.extension().Repeats(calls.SETTINGS, *of_tensors).run
    return calls.repeat.__self__


def _remember(launch: Launch, known: Known, entry: _Entry) -> None:
    versions = [-1 if version is None else version for version in entry.last[3]]
    op, arguments, lead, same = launch.repeated
    # Of x only the alignment counts.
    addresses = [arguments[0].data_ptr(), *known.addresses]
    packed = weakref.ref(entry), entry.regions, entry.checksum, launch.bind(entry.result)
    out = tuple(launch.out.shape), launch.out.stride(), launch.out.dtype
    _repeats().add(op, arguments, lead, same, addresses, versions, *packed, launch.between, *out)


def _in_full() -> bool:
    return _DISTRIBUTED and torch.distributed.is_initialized()


def packed(
    anchor: Tensor,
    parameters: Sequence[Tensor | None],
    configuration: Hashable,
    pack: Callable[[], Any],
    known: Known | None = None,
    variant: Hashable = None,
    launch: Launch | None = None,
) -> Any:
    """Return the result of ``pack()`` for the present `parameters`; it is kept as long as the anchor's storage.

    `known` are the same parameters in a call with a signature, for a faster look; with a `launch` the extension serves
    calls that repeat this one. Of one anchor and configuration the results of the last `VARIANTS` variants are kept.
    """
    in_full = _in_full()
    seen = None if known is None else known.seen(in_full)
    storage = anchor.untyped_storage()
    key = (storage._cdata, anchor.storage_offset(), configuration, variant)
    entry = _entries.get(key)
    facts = None
    if entry is not None:
        if seen is None or entry.last != seen:
            facts = _facts(parameters, in_full)
        if (facts is None or entry.facts == facts) and entry.regions.checksum() == entry.checksum:
            entry.last = seen
            if launch is not None:
                _remember(launch, known, entry)
            return entry.result
    regions = _regions(parameters, in_full)
    if regions is None:
        return pack()
    made = _Entry()
    made.checksum = regions.checksum()  # before packing, so that the next call detects a change in between
    made.facts = facts or _facts(parameters, in_full)
    made.reference, made.regions, made.last = StorageWeakRef(storage), regions, seen
    made.result = pack()
    with _lock:
        for dead in [k for k, other in _entries.items() if other.reference.expired()]:
            del _entries[dead]
        _entries.pop(key, None)
        others = [k for k in _entries if k[:3] == key[:3]]
        for old in others[: max(0, len(others) + 1 - VARIANTS)]:
            del _entries[old]
        _entries[key] = made
    return made.result
