"""The backends, a package each. Every package has one file per op, with the same names in all packages.

A backend package has

- ``unavailable() -> str | None``: why it cannot run on this machine at all, or None;
- ``refuses(spec) -> str | None``: why it cannot serve this op at this configuration, or None;
- ``describe() -> str``: one line for ``convnext-kernels info``;
- ``DEVICES``: the device types for which "auto" tries it; None for all;
- one module per op of ``spec.OPS`` with ``forward(...)`` and ``backward(...)``. Those of ``mlp`` and ``block`` can fill
  and use the tensors that the op keeps for the gradient (ops/block.py); ``KEEPS_HIDDEN`` says whether they gain by it.
  That of ``block`` has ``KEEPS_ROUNDED``: whether under autocast these tensors have the dtype of the matmuls.
"""

import functools
import importlib
from types import ModuleType

# In order of preference: "auto" takes the first one that can serve the call.
NAMES = ("triton", "cuda", "cpu", "eager")


@functools.cache
def get(name: str) -> ModuleType:
    """Import the backend `name`. Raises KeyError for a name that is not in NAMES."""
    if name not in NAMES:
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def op_module(name: str, op: str) -> ModuleType:
    """Import the module of backend `name` for `op`."""
    return importlib.import_module(f"{__name__}.{name}.{op}")
