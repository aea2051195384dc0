"""timm: ``timm.models.convnext``, V1 and V2, with Linear or 1x1 convolutions."""

import sys

from torch import nn

from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import Match
from convnext_kernels.interop.block import BlockAdapter, Parts
from convnext_kernels.interop.layers import DownsampleAdapter, LayerNorm2dAdapter, is_downsampling
from convnext_kernels.interop.structure import parameter


class ConvNeXtBlockAdapter(BlockAdapter):
    """timm's ``ConvNeXtBlock``: ``conv_dw``, ``norm``, ``mlp``, ``gamma`` or None, ``shortcut``, ``drop_path``."""

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return timm's classes."""
        from timm import layers
        from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp, activations
        from timm.layers.grn import GlobalResponseNorm

        def classes(library: object, *names: str) -> tuple[type, ...]:
            return tuple(getattr(library, name) for name in names if hasattr(library, name))  # older timm has fewer

        return {
            "norm": (LayerNorm, nn.LayerNorm, *classes(layers, "RmsNorm", "SimpleNorm")),
            "norm2d": (LayerNorm2d, *classes(layers, "RmsNorm2d", "SimpleNorm2d")),
            "norm_rms": classes(layers, "RmsNorm", "RmsNorm2d"),
            "norm_simple": classes(layers, "SimpleNorm", "SimpleNorm2d"),
            "act_gelu": classes(activations, "GELU"),
            "act_gelu_tanh": classes(activations, "GELUTanh"),
            "act_quick_gelu": classes(activations, "QuickGELU"),
            "drop_path": (DropPath,),
            "mlp": (Mlp,),
            "grn_mlp": (GlobalResponseNormMlp,),
            "grn": (GlobalResponseNorm,),
        }

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Find the parts in the MLP; a shortcut other than the identity changes the block's shape."""
        children = module._modules
        mlp, norm, shortcut = children["mlp"], children["norm"], children["shortcut"]
        if type(shortcut) is not nn.Identity:
            conv = children["conv_dw"]
            return (
                f"the shortcut is not the identity ({conv.in_channels} -> {conv.out_channels} channels, "
                f"stride {conv.stride}, dilation {conv.dilation})"
            )
        with_grn = cls.known("grn_mlp", mlp)
        if not with_grn and not cls.known("mlp", mlp):
            return f"the MLP is a {structure.class_of(mlp).__name__}"
        inner = mlp._modules
        fc1, drop1, drop2 = inner["fc1"], inner["drop1"], inner["drop2"]
        others = (shortcut, mlp, drop1, drop2)
        if not with_grn:
            if type(inner["norm"]) is not nn.Identity:
                return f"the MLP has a {type(inner['norm']).__name__}"
            others = (*others, inner["norm"])
        for dropout in (drop1, drop2):
            if type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0):
                return f"the MLP has {dropout!r} in training"
        # Norm and MLP must fit the layout that the forward uses: NCHW for convolutions, NHWC for Linear.
        if not structure.is_one_of(norm, cls.types["norm2d" if module.use_conv_mlp else "norm"]):
            return f"the norm is a {structure.class_of(norm).__name__}"
        if module.use_conv_mlp != isinstance(fc1, nn.Conv2d):
            return f"the MLP has {structure.class_of(fc1).__name__} layers, but use_conv_mlp={module.use_conv_mlp}"
        return Parts(
            children["conv_dw"],
            norm,
            fc1,
            inner["act"],
            inner["fc2"],
            children["drop_path"],
            parameter(module, "gamma"),
            inner["grn"] if with_grn else None,
            others,
        )

    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Accept both norms: `parts` has checked which one is correct here."""
        return structure.layer_norm(norm, cls.types["norm"] + cls.types["norm2d"], channels)


class TimmDownsampleAdapter(DownsampleAdapter):
    """timm's Sequential of ``LayerNorm2d`` and a strided convolution."""

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return timm's classes."""
        from timm.layers import LayerNorm2d

        return {"norm2d": (LayerNorm2d,)}


def match(module: nn.Module) -> Match | None:
    """Recognise timm's modules; None for all others, and if timm's ConvNeXt was never imported."""
    library = sys.modules.get("timm.models.convnext")
    if library is None:
        return None
    if isinstance(module, library.ConvNeXtBlock):
        return Match(ConvNeXtBlockAdapter, library.ConvNeXtBlock)
    if isinstance(module, library.LayerNorm2d):
        return Match(LayerNorm2dAdapter, library.LayerNorm2d)
    if isinstance(module, nn.Sequential) and is_downsampling(module) and isinstance(module[0], library.LayerNorm2d):
        return Match(TimmDownsampleAdapter, nn.Sequential)
    return None
