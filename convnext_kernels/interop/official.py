"""The official ConvNeXt and ConvNeXt V2 repositories, and the many copies of their ``Block``.

They are not installed as a package, so modules are recognised by their names and structure. That is not certain, so
the forward of each class is first compared with the op, once.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, MEMORY, Adapter, Match, accelerated_class
from convnext_kernels.interop.block import BlockAdapter, Parts
from convnext_kernels.interop.layers import DownsampleAdapter, LayerNorm2dAdapter, is_downsampling

_CHILDREN = {"dwconv", "norm", "pwconv1", "act", "pwconv2", "drop_path"}

# forward function of a class, names of the parameters, norm and activation -> why the op differs, or None
_trials: WeakKeyDictionary[Callable, dict[tuple, str | None]] = WeakKeyDictionary()


def _run_trial(adapter: type[Adapter], module: nn.Module, channels: int) -> str | None:
    """Compare the module's forward with the op in fp64, with random parameters instead of its own.

    It runs on the CPU, on a shallow copy without hooks and without drop path, so it does not change `module`, its
    device or the global random numbers.
    """
    clone = copy.copy(module)
    clone.__dict__.update({name: OrderedDict() for name in vars(clone) if "_hooks" in name})
    clone._modules = {name: nn.Identity() if name == "drop_path" else m for name, m in module._modules.items()}
    clone.training = False
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64, device="cpu") - 0.5

    tensors = {name: draw(*p.shape) for name, p in module.named_parameters()}
    x = draw(2, channels, 5, 4)
    try:
        with torch.no_grad():
            expected = torch.func.functional_call(clone, tensors, (x,))
    except Exception as error:  # unknown code with unexpected input may raise anything
        return f"its forward failed on {tuple(x.shape)} float64: {error}"
    clone.__class__ = accelerated_class(adapter, type(module))
    setattr(clone, BACKEND, "eager")
    setattr(clone, MEMORY, "auto")
    with torch.no_grad():
        actual = torch.func.functional_call(clone, tensors, (x,))
    if not isinstance(expected, torch.Tensor) or expected.shape != actual.shape:
        return "its forward does not return a tensor of its input's shape"
    error = (actual - expected).abs().max().item()
    # not <=, so that NaN fails too
    limit = 1e-9 * expected.abs().max().item()
    return None if error <= limit else f"its forward computes something else than the fused op (error {error:.1e})"


def _trial(adapter: type[Adapter], module: nn.Module, channels: int) -> str | None:
    results = _trials.setdefault(type(module).forward, {})
    arguments = accelerated_class(adapter, type(module)).arguments(module)
    variant = () if isinstance(arguments, str) else (arguments.norm, arguments.activation)
    key = (*(name for name, _ in module.named_parameters()), *variant)
    if key not in results:
        results[key] = _run_trial(adapter, module, channels)
    return results[key]


def _is_layer_norm(norm: nn.Module, data_format: str) -> bool:
    """Whether this is the repositories' own LayerNorm in that format."""
    return (
        structure.class_of(norm).__name__ == "LayerNorm"
        and getattr(norm, "data_format", None) == data_format
        and all(hasattr(norm, name) for name in ("weight", "bias", "eps", "normalized_shape"))
    )


class OfficialBlockAdapter(BlockAdapter):
    """The official ``Block``: V1 with ``gamma``, V2 with ``grn``."""

    grn_names = ("gamma", "beta")
    type_names: ClassVar[dict[str, str]] = {"drop_path": "DropPath", "grn": "GRN"}

    @classmethod
    def inner_types(cls) -> dict[str, tuple[type, ...]]:
        """Return the classes that copies take from PyTorch."""
        return {"norm_rms": (nn.RMSNorm,)}

    @classmethod
    def known(cls, role: str, module: nn.Module) -> bool:
        """Recognise by the name of the class."""
        return structure.class_of(module).__name__ == cls.type_names[role]

    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Accept the repositories' own LayerNorm, and PyTorch's LayerNorm and RMSNorm."""
        own = _is_layer_norm(norm, "channels_last")
        types = (structure.class_of(norm),) if own else (nn.LayerNorm, *cls.types["norm_rms"])
        refusal = structure.layer_norm(norm, types, channels)
        return "the norm's eps is None" if refusal is None and norm.eps is None else refusal

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Require exactly the official children and parameters."""
        children, parameters = module._modules, module._parameters
        if len(children) != len(_CHILDREN) + ("grn" in children) or not all(name in children for name in _CHILDREN):
            return f"its children are {', '.join(children)}"
        if not all(name == "gamma" for name in parameters) or module._buffers:
            return f"it has {', '.join((*parameters, *module._buffers))}"
        return Parts(*(children[name] for name in Parts._fields[:6]), parameters.get("gamma"), children.get("grn"))

    @classmethod
    def trial(cls, module: nn.Module) -> str | None:
        """Compare with the block's own forward."""
        return _trial(OfficialBlockAdapter, module, module.dwconv.in_channels)


class OfficialLayerNorm2dAdapter(LayerNorm2dAdapter):
    """The official ``LayerNorm`` with ``data_format="channels_first"``."""

    @classmethod
    def trial(cls, module: nn.Module) -> str | None:
        """Compare with the norm's own forward."""
        return _trial(OfficialLayerNorm2dAdapter, module, module.weight.numel())


class OfficialDownsampleAdapter(DownsampleAdapter):
    """The official Sequential of ``LayerNorm`` and a strided convolution."""

    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Accept the repositories' own LayerNorm over channels."""
        if not _is_layer_norm(norm, "channels_first"):
            return f"the norm is a {structure.class_of(norm).__name__}"
        return structure.layer_norm(norm, (structure.class_of(norm),), channels)

    @classmethod
    def trial(cls, module: nn.Module) -> str | None:
        """Compare with the norm's own forward, unless that was done before; the convolution is PyTorch's."""
        return None if isinstance(module[0], Adapter) else OfficialLayerNorm2dAdapter.trial(module[0])


def match(module: nn.Module) -> Match | None:
    """Recognise the official modules by their structure."""
    children = module._modules
    if {"dwconv", "norm", "pwconv1", "pwconv2"} <= children.keys():
        return Match(OfficialBlockAdapter, type(module))
    if _is_layer_norm(module, "channels_first"):
        return Match(OfficialLayerNorm2dAdapter, type(module))
    if isinstance(module, nn.Sequential) and is_downsampling(module) and _is_layer_norm(module[0], "channels_first"):
        return Match(OfficialDownsampleAdapter, nn.Sequential)
    return None
