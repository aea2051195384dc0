"""timm: ``timm.models.convnext``, V1 and V2, with Linear or 1x1 convolutions."""

import sys
from typing import ClassVar

from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, MEMORY, Arguments, Match
from convnext_kernels.interop.block import BlockAdapter, Parts, drop_scale
from convnext_kernels.interop.layers import DownsampleAdapter, LayerNorm2dAdapter, channels_last, is_downsampling
from convnext_kernels.interop.structure import parameter


def _classes(library: object, *names: str) -> tuple[type, ...]:
    return tuple(getattr(library, name) for name in names if hasattr(library, name))  # older timm has fewer


def _norms() -> dict[str, tuple[type, ...]]:
    from timm import layers

    return {
        "norm2d": _classes(layers, "LayerNorm2d", "RmsNorm2d", "SimpleNorm2d"),
        "norm_rms": _classes(layers, "RmsNorm", "RmsNorm2d"),
        "norm_simple": _classes(layers, "SimpleNorm", "SimpleNorm2d"),
    }


class ConvNeXtBlockAdapter(BlockAdapter):
    """timm's ``ConvNeXtBlock``: ``conv_dw``, ``norm``, ``mlp``, ``gamma`` or None, ``shortcut``, ``drop_path``."""

    changes_shape: ClassVar[bool] = False  # whether the shortcut is a layer

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return timm's classes."""
        from timm import layers
        from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm, Mlp, activations
        from timm.layers.grn import GlobalResponseNorm

        return {
            **_norms(),
            "norm": (LayerNorm, nn.LayerNorm, *_classes(layers, "RmsNorm", "SimpleNorm")),
            "act_gelu": _classes(activations, "GELU"),
            "act_gelu_tanh": _classes(activations, "GELUTanh"),
            "act_quick_gelu": _classes(activations, "QuickGELU"),
            "drop_path": (DropPath,),
            "mlp": (Mlp,),
            "grn_mlp": (GlobalResponseNormMlp,),
            "grn": (GlobalResponseNorm,),
        }

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Find the parts in the MLP."""
        children = module._modules
        mlp, norm, shortcut = children["mlp"], children["norm"], children["shortcut"]
        if (type(shortcut) is not nn.Identity) != cls.changes_shape:
            return "its shortcut was replaced"
        with_grn = cls.known("grn_mlp", mlp)
        if not with_grn and not cls.known("mlp", mlp):
            return f"the MLP is a {structure.class_of(mlp).__name__}"
        inner = mlp._modules
        fc1, drop1, drop2 = inner["fc1"], inner["drop1"], inner["drop2"]
        others = (mlp, drop1, drop2) if cls.changes_shape else (shortcut, mlp, drop1, drop2)
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


class ShapeChangingBlockAdapter(ConvNeXtBlockAdapter):
    """timm's block with a stride, two dilations or other channels at its end, whose shortcut is a layer.

    Its convolution is one op and its bottleneck another; the shortcut stays timm's, and so does a convolution that is
    not depthwise (other channels at its end) or has a stride above 2.
    """

    changes_shape = True

    @classmethod
    def dwconv_refusal(cls, conv: nn.Module) -> str | None:
        """Accept every convolution: timm's is called where the op cannot compute it."""
        return None if structure.is_one_of(conv, (nn.Conv2d,)) else structure.depthwise(conv)

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Count the channels of the input."""
        found = super().arguments(module)
        if isinstance(found, str):
            return found
        _, tensors, parts, norm, activation = found  # _replace() is not traced by torch.compile of PyTorch 2.8
        return Arguments(parts.dwconv.in_channels, tensors, parts, norm, activation)

    def inference_block(self) -> None:
        """No part of a stage in one call."""

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Convolve, compute the shortcut, and add it to the bottleneck's result."""
        _, (weight, bias, norm_weight, norm_bias, *p), parts, norm, activation = arguments
        conv, options = parts.dwconv, {"backend": getattr(self, BACKEND)}
        *p, gamma, grn_weight, grn_bias = p
        if structure.depthwise(conv, strides=(1, 2)) is None:
            y = functional.depthwise_conv2d(
                channels_last(x), weight, bias, stride=conv.stride[0], dilation=conv.dilation, **options
            )
        else:
            y = channels_last(conv(x))
        return functional.inverted_bottleneck(
            y,
            norm_weight,
            norm_bias,
            *p,
            gamma=gamma,
            grn_weight=grn_weight,
            grn_bias=grn_bias,
            residual=self.shortcut(x),
            drop_scale=drop_scale(parts.drop_path, x, gamma),
            eps=parts.norm.eps,
            grn_eps=getattr(parts.grn, "eps", 1e-6),
            norm=norm,
            activation=activation,
            memory=getattr(self, MEMORY),
            **options,
        )


class TimmNorm2dAdapter(LayerNorm2dAdapter):
    """timm's ``LayerNorm2d``, ``RmsNorm2d`` or ``SimpleNorm2d``."""

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return timm's classes."""
        return _norms()


class TimmDownsampleAdapter(DownsampleAdapter):
    """timm's Sequential of one of these and a strided convolution."""

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return timm's classes."""
        return _norms()


def match(module: nn.Module) -> Match | None:
    """Recognise timm's modules; None for all others, and if timm's ConvNeXt was never imported."""
    library = sys.modules.get("timm.models.convnext")
    if library is None:
        return None
    if isinstance(module, library.ConvNeXtBlock):
        changes_shape = type(module._modules["shortcut"]) is not nn.Identity
        return Match(ShapeChangingBlockAdapter if changes_shape else ConvNeXtBlockAdapter, library.ConvNeXtBlock)
    norms = _classes(library, "LayerNorm2d", "RmsNorm2d", "SimpleNorm2d")
    if isinstance(module, norms):
        return Match(TimmNorm2dAdapter, next(norm for norm in norms if isinstance(module, norm)))
    if isinstance(module, nn.Sequential) and is_downsampling(module) and isinstance(module[0], norms):
        return Match(TimmDownsampleAdapter, nn.Sequential)
    return None
