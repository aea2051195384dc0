"""How a module of another library becomes an accelerated one: its class changes, and nothing else.

``accelerated_class(CNBlockAdapter, CNBlock)`` is a class with the bases ``(CNBlockAdapter, CNBlock)``. A block
whose ``__class__`` is set to it keeps its parameters, state-dict keys, hooks and mode, is still a ``CNBlock``, and
has the original forward as ``super().forward``, to which the accelerated one turns whenever it cannot serve.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from convnext_kernels.interop import structure

# What an accelerated module has more than the original: the options of `accelerate`.
BACKEND, MEMORY = "_convnext_kernels_backend", "_convnext_kernels_memory"


class Arguments(NamedTuple):
    """What a fused op is called with besides its input."""

    channels: int  # of the input
    tensors: tuple[Tensor | None, ...]
    parts: Any  # the adapter's own view of the module


class Match(NamedTuple):
    """A module was recognised."""

    adapter: "type[Adapter]"
    original: type[nn.Module]  # the class whose forward the adapter stands for


class Adapter:
    """Mixin that stands before the original class. Stateless: what it needs is read from the module every time."""

    kind: ClassVar[str]  # what it replaces, for the report
    ignores_keywords: ClassVar[bool] = False  # whether the original forward takes and ignores keyword arguments
    types: ClassVar[dict[str, tuple[type, ...]]] = {}  # `inner_types()`
    original: ClassVar[type]  # the class to go back to

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return the library's classes of inner modules that the fused op can stand for."""
        return {}

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return what the fused op needs, or why it cannot stand for `module` as it is now."""
        raise NotImplementedError

    @classmethod
    def trial(cls, module: nn.Module) -> str | None:
        """Return why a run of the module speaks against the fused op; asked once, after `arguments`."""
        return None

    @classmethod
    def covered(cls, module: nn.Module) -> Iterable[nn.Module]:
        """Return the children that the fused op stands for."""
        return module.children()

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Whether the fused op gives for x what the original forward would."""
        return structure.serves(x, arguments.channels, arguments.tensors)

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Compute the module on an x that it `serves`."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused op, or the original forward where only that one is right."""
        if len(args) == 1 and (not kwargs or self.ignores_keywords):
            arguments = self.arguments(self)
            if not isinstance(arguments, str) and self.serves(args[0], arguments):
                return self.fused(args[0], arguments)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Copy and pickle as "this adapter on that class": the class itself exists only in this process."""
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return rebuild, (adapter_of(type(self)), type(self).original), *state


def adapter_of(accelerated: type[Adapter]) -> type[Adapter]:
    """Return the adapter that `accelerated_class` was called with."""
    return accelerated.__bases__[0]


@functools.cache
def accelerated_class(adapter: type[Adapter], original: type[nn.Module]) -> type:
    """Return the class with `adapter` before `original`."""
    namespace = {"__doc__": adapter.__doc__, "types": adapter.inner_types(), "original": original}
    return type(f"Accelerated{original.__name__}", (adapter, original), namespace)


def rebuild(adapter: type[Adapter], original: type[nn.Module]) -> nn.Module:
    """Make the empty module that `copy` and `pickle` fill."""
    accelerated = accelerated_class(adapter, original)
    return accelerated.__new__(accelerated)
