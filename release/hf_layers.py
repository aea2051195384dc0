"""Layers for `kernels.kernelize`: transformers' ConvNeXt blocks in one op, forward and backward.

``hf_kernels.py`` puts this file into the kernel repository. The classes have a forward only, which `kernelize` binds
to the model's own modules: parameters, names and hooks stay. A block that the op cannot compute as it is now (another
activation, a quantised layer, mixed dtypes) runs transformers' forward.
"""

import sys

from torch import Tensor, nn

from convnext_kernels.interop import transformers
from convnext_kernels.interop.adapter import accelerated_class


def _adapters() -> dict[str, type]:
    """By name of the layer: what finds a block's parts, for the files of transformers that are loaded."""
    found = {}
    for adapters in transformers._FAMILIES:
        library = sys.modules.get(adapters.layer.file)
        if library is not None:
            layer = getattr(library, f"{adapters.layer.prefix}Layer")
            found[layer.__name__] = accelerated_class(adapters.layer, layer)
    return found


# `kernelize` imports this file for a model that exists, so transformers' file is loaded; with a model of another family
# later, `_forward` adds it.
_ADAPTERS = _adapters()


def _forward(module: nn.Module, x: Tensor, name: str) -> Tensor:
    if name not in _ADAPTERS:
        _ADAPTERS.update(_adapters())
    adapter = _ADAPTERS[name]
    arguments = adapter.arguments(module)
    if isinstance(arguments, str) or not adapter.serves(module, x, arguments):
        return type(module).forward(module, x)
    return adapter.fused(module, x, arguments)


class ConvNextLayer(nn.Module):
    """transformers' ``ConvNextLayer``: (N, C, H, W) in and out, fp32, bf16, fp16."""

    has_backward = True
    can_torch_compile = True

    def forward(self, features: Tensor) -> Tensor:
        """Compute the block."""
        return _forward(self, features, "ConvNextLayer")


class ConvNextV2Layer(nn.Module):
    """transformers' ``ConvNextV2Layer``: (N, C, H, W) in and out, fp32, bf16, fp16."""

    has_backward = True
    can_torch_compile = True

    def forward(self, features: Tensor) -> Tensor:
        """Compute the block."""
        return _forward(self, features, "ConvNextV2Layer")


class DINOv3ConvNextLayer(nn.Module):
    """transformers' ``DINOv3ConvNextLayer``: (N, C, H, W) in and out, fp32, bf16, fp16."""

    has_backward = True
    can_torch_compile = True

    def forward(self, features: Tensor) -> Tensor:
        """Compute the block."""
        return _forward(self, features, "DINOv3ConvNextLayer")
