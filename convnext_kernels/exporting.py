"""What exporters and tracers see.

Exporters see PyTorch's operators, so that any runtime can take the program, or this package's ops. Exporting is not
compiling: `torch.compile` runs the graph here and always keeps the ops. `torch.fx` sees our modules as nodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.fx import Proxy

from convnext_kernels import torch_versions

# Not a ContextVar: Dynamo, which traces for `strict=True`, cannot read one before 2.12. PyTorch's own flag, that
# something is exported, belongs to the process as well.
_kept = False
_launches = False


@contextmanager
def keep_ops() -> Iterator[None]:
    """Let `torch.export` keep this package's ops as nodes inside a ``with`` block, instead of PyTorch's operators.

    Such a program runs where `convnext_kernels` is imported, with the backend that serves the call there; AOTInductor
    compiles it. `torch.jit.trace` cannot keep the ops: RuntimeError. The setting belongs to the process.
    """
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


@contextmanager
def tracing_launches() -> Iterator[None]:
    """Let `traces_launches` be true inside a ``with`` block, and launches of Triton's kernels be nodes of a graph."""
    global _launches
    before, _launches = _launches, True
    try:
        yield
    finally:
        _launches = before


def traces_launches() -> bool:
    """Whether a compiler traces launches (`ops.registration.inline_kernels`)."""
    return _launches


def composed() -> bool:
    """Whether `torch.export` traces this call and gets PyTorch's operators; only for where something is compiled."""
    return torch_versions.exporting() and not _kept


def traced() -> bool:
    """Whether `torch.jit.trace` traces this call. Sizes are tensors then, and comparing them warns.

    Raises RuntimeError under `keep_ops`.
    """
    if not torch.jit.is_tracing():
        return False
    if _kept:
        raise RuntimeError("keep_ops: torch.jit.trace cannot keep the ops of this package; use torch.export.export")
    return True


class Whole:
    """Mixin of modules that one op computes: `torch.fx` does not look inside, and `torch.jit.script` cannot."""

    def node(self, *args: Any, **kwargs: Any) -> Proxy | None:
        """The node of this call in a trace of `torch.fx`, as for modules of `torch.nn`; None if there is no trace.

        Any tracer makes it, whatever its `is_leaf_module` says. Raises RuntimeError where the module itself is traced.
        """
        proxies = [a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)]
        if not proxies:
            return None
        proxy = proxies[0]
        path = proxy.tracer.path_of_module(self)
        if not path:
            raise RuntimeError(
                f"torch.fx cannot trace into {type(self).__name__}, which one op computes: trace a module around it"
            )
        return proxy.tracer.create_proxy("call_module", path, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """`torch.jit.script` calls this first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.export.export or torch.jit.trace; an "
            "accelerated model can also be scripted after convnext_kernels.restore(model)"
        )
