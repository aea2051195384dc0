"""The backends, one room each; inside a room one file per op, with the same names in every room.

A backend package offers

- ``unavailable() -> str | None``: why it cannot run on this machine at all, or None;
- ``refuses(spec) -> str | None``: why it cannot serve this op at this configuration, or None;
- ``describe() -> str``: a few words for ``convnext-kernels info``;
- ``DEVICES``: the device types that "auto" takes it for;
- one module per op of ``spec.OPS`` with ``forward(...)`` and ``backward(...)``; those of ``mlp`` and
  ``block`` say in ``KEEPS_HIDDEN`` whether they can fill and use what the op keeps for the gradient (ops/block.py).
"""

import functools
import importlib
from types import ModuleType

# In order of preference: with "auto" the first one that can serve is taken.
NAMES = ("triton", "cuda", "cpu", "eager")


@functools.cache
def get(name: str) -> ModuleType:
    """Import the backend `name`. Raises KeyError for a name that is not in NAMES."""
    if name not in NAMES:
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def op_module(name: str, op: str) -> ModuleType:
    """Import the file of backend `name` that holds `op`."""
    return importlib.import_module(f"{__name__}.{name}.{op}")
