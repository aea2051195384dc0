"""transformers: ConvNeXt, ConvNeXt V2 and the ConvNeXt backbones of DINOv3."""

import importlib
import sys
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import Arguments, Match
from convnext_kernels.interop.block import BlockAdapter, Parts
from convnext_kernels.interop.layers import DownsampleAdapter, LayerNorm2dAdapter, is_downsampling
from convnext_kernels.interop.structure import parameter
from convnext_kernels.nn import sequential

# transformers' own classes, of several versions
_ACTIVATIONS = {
    "gelu": ("GELUActivation",),
    "gelu_tanh": ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation"),
    "quick_gelu": ("QuickGELUActivation",),
    "silu": ("SiLUActivation",),
    "mish": ("MishActivation",),
}


class _Family:
    """One of transformers' three files. Each has its own copy of the layers, with its own prefix."""

    file: ClassVar[str]
    prefix: ClassVar[str]

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return the classes of the family's file."""
        from transformers import activations

        library = importlib.import_module(cls.file)
        norm = (getattr(library, f"{cls.prefix}LayerNorm"),)
        types = {"norm": norm, "norm2d": norm}
        for name, classes in _ACTIVATIONS.items():
            types[f"act_{name}"] = tuple(getattr(activations, c) for c in classes if hasattr(activations, c))
        types["drop_path"] = tuple(v for k, v in vars(library).items() if k.endswith("DropPath"))
        types["grn"] = tuple(v for k, v in vars(library).items() if k == f"{cls.prefix}GRN")
        return types


class _LayerAdapter(_Family, BlockAdapter):
    names: ClassVar[tuple[str, ...]]  # of the modules, in the order of `Parts`
    gamma_name: ClassVar[str | None] = None  # without gamma, the layer has a child `grn`

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Find the modules by their names."""
        children = module._modules
        modules = [children[name] for name in cls.names]
        if cls.gamma_name is None:
            return Parts(*modules, grn=children["grn"])
        return Parts(*modules, gamma=parameter(module, cls.gamma_name))

    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Require the data format that the layer's forward normalises in."""
        refusal = structure.layer_norm(norm, cls.types["norm"], channels)
        if refusal is None and norm.data_format != "channels_last":
            return f"the norm has data_format={norm.data_format!r}"
        return refusal


class _ConvNext(_Family):
    file = "transformers.models.convnext.modeling_convnext"
    prefix = "ConvNext"


class _ConvNextV2(_Family):
    file = "transformers.models.convnextv2.modeling_convnextv2"
    prefix = "ConvNextV2"


class _DINOv3ConvNext(_Family):
    file = "transformers.models.dinov3_convnext.modeling_dinov3_convnext"
    prefix = "DINOv3ConvNext"


class ConvNextLayerAdapter(_ConvNext, _LayerAdapter):
    """transformers' ``ConvNextLayer``."""

    names = ("dwconv", "layernorm", "pwconv1", "act", "pwconv2", "drop_path")
    gamma_name = "layer_scale_parameter"


class ConvNextV2LayerAdapter(_ConvNextV2, _LayerAdapter):
    """transformers' ``ConvNextV2Layer``."""

    names = ("dwconv", "layernorm", "pwconv1", "act", "pwconv2", "drop_path")


class DINOv3ConvNextLayerAdapter(_DINOv3ConvNext, _LayerAdapter):
    """transformers' ``DINOv3ConvNextLayer``."""

    names = ("depthwise_conv", "layer_norm", "pointwise_conv1", "activation_fn", "pointwise_conv2", "drop_path")
    gamma_name = "gamma"


class _DownsampleAdapter(_Family, DownsampleAdapter):
    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Require LayerNorm over channels."""
        refusal = super().norm_refusal(norm, channels)
        if refusal is None and norm.data_format != "channels_first":
            return f"the norm has data_format={norm.data_format!r}"
        return refusal


class ConvNextDownsampleAdapter(_ConvNext, _DownsampleAdapter):
    """Downsampling of transformers 4's ``ConvNextStage``, a Sequential."""


class ConvNextV2DownsampleAdapter(_ConvNextV2, _DownsampleAdapter):
    """Downsampling of transformers 4's ``ConvNextV2Stage``, a Sequential."""


class _StageAdapter(_DownsampleAdapter):
    """A stage with downsampling. Its forward runs the two layers of that and the blocks one by one."""

    pair_name: ClassVar[str] = "downsampling_layer"

    @classmethod
    def pair(cls, module: nn.Module) -> nn.Module:
        """Return the ModuleList."""
        return getattr(module, cls.pair_name)

    @classmethod
    def covered(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """Return only the ModuleList."""
        return (cls.pair(module),)

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Downsample in one op, then run the blocks, in inference in one call."""
        x = super().fused(x, arguments)
        result = sequential.run(self.layers, x)
        if result is not None:
            return result
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNextStageAdapter(_ConvNext, _StageAdapter):
    """transformers' ``ConvNextStage``: its downsampling, and its blocks in one call."""


class ConvNextV2StageAdapter(_ConvNextV2, _StageAdapter):
    """transformers' ``ConvNextV2Stage``: its downsampling, and its blocks in one call."""


class DINOv3ConvNextStageAdapter(_DINOv3ConvNext, _StageAdapter):
    """transformers' ``DINOv3ConvNextStage``: its downsampling, and its blocks in one call."""

    pair_name = "downsample_layers"
    ignores_keywords = True


class _Adapters(NamedTuple):
    layer: type[_LayerAdapter]
    stage: type[_StageAdapter]
    downsample: type[_DownsampleAdapter] | None = None


_FAMILIES = (
    _Adapters(ConvNextLayerAdapter, ConvNextStageAdapter, ConvNextDownsampleAdapter),
    _Adapters(ConvNextV2LayerAdapter, ConvNextV2StageAdapter, ConvNextV2DownsampleAdapter),
    _Adapters(DINOv3ConvNextLayerAdapter, DINOv3ConvNextStageAdapter),
)


def match(module: nn.Module) -> Match | None:
    """Recognise transformers' modules; None for all others, and if their files were never imported."""
    for adapters in _FAMILIES:
        library = sys.modules.get(adapters.layer.file)
        if library is None:
            continue
        prefix = adapters.layer.prefix
        layer, stage, norm = (getattr(library, f"{prefix}{kind}") for kind in ("Layer", "Stage", "LayerNorm"))
        if isinstance(module, layer):
            return Match(adapters.layer, layer)
        if isinstance(module, norm) and module.data_format == "channels_first":
            return Match(LayerNorm2dAdapter, norm)
        if isinstance(module, stage):
            pair = adapters.stage.pair(module)
            if type(pair) is nn.ModuleList and is_downsampling(pair):
                return Match(adapters.stage, stage)
        is_sequential = adapters.downsample and isinstance(module, nn.Sequential)
        if is_sequential and is_downsampling(module) and isinstance(module[0], norm):
            return Match(adapters.downsample, nn.Sequential)
    return None
