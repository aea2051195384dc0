"""The table of matchers, and the search through a model that uses them."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from convnext_kernels.interop import depthwise, official, speech, timm, torchvision, transformers, volumes
from convnext_kernels.interop.adapter import Accelerated, Adapter, accelerated_class, adapter_of
from convnext_kernels.nn import (
    DepthwiseConv2d,
    DepthwiseConv3d,
    FusedConvNeXtBlock,
    LayerNorm2d,
    PatchDownsample2d,
)

# Tried in this order; blocks over time, the official repositories and lone convolutions come last because they are
# recognised only by their structure.
ECOSYSTEMS = (torchvision, timm, transformers, speech, official, depthwise, volumes)

# Modules of this package, which need no replacement.
OWN = {
    FusedConvNeXtBlock: "block",  # the one over time is a subclass
    PatchDownsample2d: "downsampling",
    LayerNorm2d: "layer norm",
    DepthwiseConv2d: "depthwise convolution",
    DepthwiseConv3d: "depthwise convolution",
}


class Finding(NamedTuple):
    """A module of a kind that this package can replace."""

    name: str  # in the model; empty for the model itself
    module: nn.Module
    accelerated: type[Adapter] | None  # the class it has or could have; None if it is one of this package
    refusal: str | None  # why the fused op cannot be used for it as it is now


def _judge(module: nn.Module) -> tuple[type[Adapter], str | None] | None:
    """Return the accelerated class for `module` and the reason against it, if any; None for any other module."""
    if isinstance(module, Adapter):
        arguments = module.arguments(module)
        return type(module), arguments if isinstance(arguments, str) else None
    match = next((m for ecosystem in ECOSYSTEMS if (m := ecosystem.match(module))), None)
    if match is None:
        return None
    accelerated = accelerated_class(match.adapter, type(module))
    if type(module).forward is not match.original.forward:
        return accelerated, f"{type(module).__name__} overrides the forward of {match.original.__name__}"
    if "forward" in vars(module):
        return accelerated, "its forward was replaced"
    if parametrize.is_parametrized(module):
        return accelerated, "one of its parameters is parametrised, which depends on the module's class"
    arguments = accelerated.arguments(module)
    return accelerated, arguments if isinstance(arguments, str) else accelerated.trial(module)


def find(model: nn.Module) -> Iterator[Finding]:
    """Yield the modules of `model` that are or could be replaced, without the inner modules of replaced ones."""
    seen = set()

    def walk(name: str, module: nn.Module) -> Iterator[Finding]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, tuple(OWN)):
            yield Finding(name, module, None, None)
            return
        judged = _judge(module)
        if judged is not None:
            accelerated, refusal = judged
            yield Finding(name, module, *judged)
            if refusal is None or isinstance(module, Adapter):
                seen.update(accelerated.covered(module))
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", model)


def original_class(module: Accelerated) -> type[nn.Module] | None:
    """Return the original class of an accelerated module; None if another tool has changed its class since."""
    kind = type(module)
    ours = "original" in vars(kind) and accelerated_class(adapter_of(kind), kind.original) is kind
    return kind.original if ours else None
