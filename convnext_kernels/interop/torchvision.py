"""torchvision: ``torchvision.models.convnext``."""

import sys

from torch import nn

from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import Match
from convnext_kernels.interop.block import BlockAdapter, Parts
from convnext_kernels.interop.layers import DownsampleAdapter, LayerNorm2dAdapter, is_downsampling
from convnext_kernels.interop.structure import parameter


class CNBlockAdapter(BlockAdapter):
    """torchvision's ``CNBlock``: a Sequential, ``layer_scale`` (C, 1, 1) and stochastic depth."""

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return torchvision's classes."""
        from torchvision.ops import Permute, StochasticDepth

        return {"norm": (nn.LayerNorm,), "drop_path": (StochasticDepth,), "permute": (Permute,)}

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Return the modules of the Sequential, in its order."""
        children = module._modules
        block = children["block"]
        if len(block._modules) != 7:
            return f"it has {len(block._modules)} layers, expected 7"
        dwconv, to_nhwc, norm, pwconv1, act, pwconv2, to_nchw = block._modules.values()
        for permute, dims in ((to_nhwc, [0, 2, 3, 1]), (to_nchw, [0, 3, 1, 2])):
            if not cls.known("permute", permute) or permute.dims != dims:
                return f"expected a permutation to {dims}, got {structure.class_of(permute).__name__}"
        return Parts(
            dwconv,
            norm,
            pwconv1,
            act,
            pwconv2,
            children["stochastic_depth"],
            parameter(module, "layer_scale"),
            others=(block, to_nhwc, to_nchw),
        )


class TorchvisionDownsampleAdapter(DownsampleAdapter):
    """torchvision's Sequential of ``LayerNorm2d`` and a strided convolution."""

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return torchvision's classes."""
        from torchvision.models.convnext import LayerNorm2d

        return {"norm2d": (LayerNorm2d,)}


def match(module: nn.Module) -> Match | None:
    """Recognise torchvision's modules; None for all others, and if torchvision was never imported."""
    library = sys.modules.get("torchvision.models.convnext")
    if library is None:
        return None
    if isinstance(module, library.CNBlock):
        return Match(CNBlockAdapter, library.CNBlock)
    if isinstance(module, library.LayerNorm2d):
        return Match(LayerNorm2dAdapter, library.LayerNorm2d)
    if isinstance(module, nn.Sequential) and is_downsampling(module) and isinstance(module[0], library.LayerNorm2d):
        return Match(TorchvisionDownsampleAdapter, nn.Sequential)
    return None
