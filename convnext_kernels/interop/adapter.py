"""How a module of another library becomes an accelerated one: only its class changes.

``accelerated_class(CNBlockAdapter, CNBlock)`` is a class with the bases ``(CNBlockAdapter, CNBlock)``. A block
whose ``__class__`` is set to it keeps its parameters, state-dict keys, hooks and mode, and is still a ``CNBlock``.
Its forward runs the fused op where that is correct, otherwise ``super().forward``, the original one.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from convnext_kernels import exporting
from convnext_kernels.interop import structure
from convnext_kernels.nn import sequential
from convnext_kernels.nn.layers import widened
from convnext_kernels.variants import GELU, LAYER, NORMS

# The attributes that `accelerate` adds to a module: its options.
BACKEND, MEMORY = "_convnext_kernels_backend", "_convnext_kernels_memory"


class Arguments(NamedTuple):
    """The arguments of a fused op besides its input."""

    channels: int  # of the input
    tensors: tuple[Tensor | None, ...]
    parts: Any  # the adapter's own view of the module
    norm: str = LAYER  # of `variants`
    activation: str = GELU  # of a block


class Match(NamedTuple):
    """A module was recognised."""

    adapter: "type[Adapter]"
    original: type[nn.Module]  # the class whose forward the adapter replaces


class Accelerated:
    """Mixin in front of the original class."""

    types: ClassVar[dict[str, tuple[type, ...]]] = {}  # `inner_types()`
    original: ClassVar[type]  # the class that `restore` sets

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return the library's classes of inner modules that the fused op can replace."""
        return {}

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Copy and pickle as adapter and original class, because the combined class exists only in this process."""
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return rebuild, (adapter_of(type(self)), type(self).original), *state


class Adapter(exporting.Whole, Accelerated):
    """One op in place of the module. It has no state: it reads the module again in every call."""

    kind: ClassVar[str]  # what it replaces, for the report
    ignores_keywords: ClassVar[bool] = False  # whether the original forward takes and ignores keyword arguments

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return the arguments of the fused op, or why it cannot replace `module` as it is now."""
        raise NotImplementedError

    @classmethod
    def trial(cls, module: nn.Module) -> str | None:
        """Run the module and return why the fused op cannot replace it, or None; called once, after `arguments`."""
        return None

    @classmethod
    def covered(cls, module: nn.Module) -> Iterable[nn.Module]:
        """Return the children that the fused op replaces."""
        return module.children()

    @classmethod
    def affine(cls, norm: nn.Module) -> tuple[str, tuple[Tensor | None, Tensor | None]] | str:
        """Return which of `variants.NORMS` this is, with its weight and bias, or why the op cannot compute it."""
        kind = LAYER
        for other in NORMS[1:]:
            types = cls.types.get(f"norm_{other}")
            if types and structure.is_one_of(norm, types):
                kind = other
        weight, bias = structure.parameter(norm, "weight"), structure.parameter(norm, "bias") if kind == LAYER else None
        if weight is None or (kind == LAYER and bias is None):
            return f"the norm has no weight{' or no bias' if kind == LAYER else ''}"
        return kind, (weight, bias)

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Whether the fused op computes the same for x as the original forward."""
        return structure.serves(x, arguments.channels, arguments.tensors)

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Compute the module with the fused op; `serves` is true for x."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused op, or the original forward where only that one is correct."""
        if len(args) == 1 and (not kwargs or self.ignores_keywords) and not isinstance(args[0], Proxy):
            arguments = self.arguments(self)
            if not isinstance(arguments, str) and self.serves(args[0], arguments):
                return self.fused(args[0], arguments)
        node = self.node(*args, **kwargs)
        return super().forward(*args, **kwargs) if node is None else node


class SequentialAdapter(Accelerated):
    """A `torch.nn.Sequential` of blocks, in one call in inference (`nn.sequential`)."""

    def forward(self, x: Any) -> Any:
        """Run all blocks at once, or one by one."""
        result = sequential.run(self, x)
        return super().forward(x) if result is None else result


class StemAdapter(Accelerated):
    """The convolution of images by a `torch.nn.Conv2d`, on a CPU without products of bf16 (`nn.layers.widened`)."""

    def forward(self, x: Any) -> Any:
        """Compute bf16 images on a CPU in fp32."""
        result = None if type(x) is not Tensor else widened(self, x)
        return super().forward(x) if result is None else result


def adapter_of(accelerated: type[Accelerated]) -> type[Accelerated]:
    """Return the adapter that `accelerated_class` was called with."""
    return accelerated.__bases__[0]


@functools.cache
def accelerated_class(adapter: type[Accelerated], original: type[nn.Module]) -> type:
    """Return the class with the bases `adapter` and `original`, in this order."""
    namespace = {"__doc__": adapter.__doc__, "types": adapter.inner_types(), "original": original}
    return type(f"Accelerated{original.__name__}", (adapter, original), namespace)


def rebuild(adapter: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    """Create the empty module that `copy` and `pickle` fill."""
    accelerated = accelerated_class(adapter, original)
    return accelerated.__new__(accelerated)
