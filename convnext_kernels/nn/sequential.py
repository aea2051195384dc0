"""Consecutive blocks as one module."""

from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from convnext_kernels.ops.blocks import Blocks, snapshot

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(module_globals, f"_global{name}") for name in _HOOKS]


class _Snapshot:
    """What modules are like: classes, attributes, parameters, children, and that none has hooks.

    To compare takes 0.2 us a module, a fifteenth of what it takes to ask each module for what its forward depends on;
    0.5 us without the extension.
    """

    def __init__(self, children: dict[str, nn.Module | None], parents: list[dict[str, Any]]) -> None:
        # `parents`: attributes of the module that remembers this. Not the module, which would never be freed.
        self.modules = [m for child in children.values() if child is not None for m in child.modules()]
        own = [vars(m) for m in self.modules] + parents
        self.hooks = [attributes[name] for attributes in own for name in _HOOKS] + _GLOBAL_HOOKS
        self.attributes = own
        nested = [attributes[name] for attributes in own for name in ("_modules", "_parameters")]
        self.nested = [children, *filter(None, nested)]
        self.holds = snapshot(self.modules, self.attributes, self.nested, self.hooks) or self._holds
        self.types, self.values, self.objects = self._state()

    def _state(self) -> tuple[list, list, list]:
        values = list(map(tuple, map(dict.values, self.attributes)))
        return list(map(type, self.modules)), values, list(chain.from_iterable(map(dict.values, self.nested)))

    def _holds(self) -> bool:
        """Whether nothing has changed since."""
        if any(self.hooks):
            return False
        types, values, objects = self._state()
        try:
            same = types == self.types and values == self.values
        except RuntimeError:  # tensors among the attributes cannot be compared
            return False
        return same and len(objects) == len(self.objects) and all(map(is_, objects, self.objects))


class _Found:
    """The blocks of a container, or of a single block."""

    def __init__(self, module: nn.Module, alone: bool) -> None:
        children = module._modules
        self.snapshot = _Snapshot(children, [vars(module)] if alone else [])
        self.blocks: Blocks | None = None
        if any(self.snapshot.hooks) or any("forward" in attributes for attributes in self.snapshot.attributes):
            return
        found = [_inference_block(child) for child in ([module] if alone else children.values())]
        backends = {backend for _, backend in filter(None, found)}
        if len(backends) == 1 and None not in found:
            self.blocks = Blocks([block for block, _ in found], backends.pop())


def _inference_block(module: Any) -> Any:
    find = getattr(module, "inference_block", None)
    return None if find is None else find()


_found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def run(container: nn.Sequential | nn.ModuleList, x: object) -> Tensor | None:
    """Compute all blocks of `container` in one call; None if they must be called one by one.

    They must under torch.compile, with gradients or autocast, with hooks on anything inside, under a profiler, a mode
    or a transform, and if something inside is not a block that this package computes.
    """
    return _run(container, x, False)


def run_block(block: nn.Module, x: object) -> Tensor | None:
    """Compute another library's block as one of a container; None if it must be asked what its forward depends on."""
    return _run(block, x, True)


def _run(module: nn.Module, x: object, alone: bool) -> Tensor | None:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return None
    found = _found.get(module)
    if found is None or not found.snapshot.holds():
        found = _found[module] = _Found(module, alone)
    return None if found.blocks is None else found.blocks.run(x)


class FusedSequential(nn.Sequential):
    """A `torch.nn.Sequential` that computes consecutive `FusedConvNeXtBlock`s in one call where it can: in inference.

    The result is that of the blocks' own calls, bit by bit. These are made where anything wants to see them: with
    gradients, autocast, hooks, a profiler, torch.compile, and with other modules among the blocks. What forward raises,
    the blocks raise.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), through all modules."""
        result = run(self, x)
        return super().forward(x) if result is None else result
