"""Blocks over time, (N, C, L) or (N, L, C): Vocos' ``ConvNeXtBlock``, F5-TTS' ``ConvNeXtV2Block`` and their copies.

They are recognised by their names and structure, wherever they are defined; which of the two layouts a class takes is
found by running it once. The op sees them as images of one row.
"""

import copy
from collections import OrderedDict
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, MEMORY, Adapter, Arguments, Match
from convnext_kernels.interop.block import BlockAdapter, Parts
from convnext_kernels.interop.layers import channels_last
from convnext_kernels.interop.structure import parameter
from convnext_kernels.nn.block1d import rows_of

_CHILDREN = {"dwconv", "norm", "pwconv1", "act", "pwconv2"}
_CONDITION = "cond_embedding_id"  # Vocos' keyword for the index of an AdaLayerNorm's scale and shift


class _Time(NamedTuple):
    """What `arguments` finds of a block over time."""

    parts: Parts
    time_first: bool  # whether x is (N, L, C)
    adaptive: bool  # whether the norm is an AdaLayerNorm


def _adaptive(norm: nn.Module) -> bool:
    """Whether this is Vocos' AdaLayerNorm: a scale and a shift from embeddings."""
    return structure.class_of(norm).__name__ == "AdaLayerNorm" and {*norm._modules} == {"scale", "shift"}


class TimeBlockAdapter(BlockAdapter):
    """A ConvNeXt block over time, V1 with or without ``gamma``, or V2."""

    # Of one original class: its activation and which parameters exist -> whether it takes (N, L, C), or why it is not
    # replaced.
    layouts: ClassVar[dict[tuple[bool | str, ...], bool | str]]

    def __init_subclass__(cls) -> None:
        """Give each original class its own table."""
        cls.layouts = {}

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Require the known children and parameters."""
        children, parameters = module._modules, module._parameters
        if {*children} != _CHILDREN | ({"grn"} & {*children}) or not {*parameters} <= {"gamma"} or module._buffers:
            return f"it has {', '.join((*children, *parameters, *module._buffers))}"
        names = ("dwconv", "norm", "pwconv1", "act", "pwconv2")
        return Parts(*(children[name] for name in names), nn.Identity(), parameters.get("gamma"), children.get("grn"))

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return the op's tensors, or the first reason why the fused op cannot be used."""
        parts = cls.parts(module)
        if isinstance(parts, str):
            return parts
        conv, norm, grn = parts.dwconv, parts.norm, parts.grn
        adaptive = _adaptive(norm)
        inner = [conv, norm, parts.pwconv1, parts.act, parts.pwconv2]
        inner += [] if grn is None else [grn]
        inner += [norm.scale, norm.shift] if adaptive else []
        refusal = (
            structure.watched(inner)
            or structure.depthwise(conv, nn.Conv1d)
            or (None if adaptive else structure.layer_norm(norm, (nn.LayerNorm,), conv.out_channels))
            or structure.pointwise(parts.pwconv1)
            or structure.pointwise(parts.pwconv2)
        )
        if refusal:
            return refusal
        activation = structure.activation(parts.act, {})
        if activation is None:
            return f"the activation is {parts.act!r}"
        if grn is not None and (structure.class_of(grn).__name__ != "GRN" or {*grn._parameters} != {"gamma", "beta"}):
            return f"the response normalisation is a {structure.class_of(grn).__name__}"
        owner = (norm.scale, norm.shift) if adaptive else (norm, norm)
        norm_tensors = parameter(owner[0], "weight"), parameter(owner[1], "weight" if adaptive else "bias")
        if norm_tensors[0] is None or norm_tensors[1] is None:
            return "the norm has no weight or no bias"
        tensors = (
            parameter(conv, "weight"),
            parameter(conv, "bias"),
            *norm_tensors,
            parameter(parts.pwconv1, "weight"),
            parameter(parts.pwconv1, "bias"),
            parameter(parts.pwconv2, "weight"),
            parameter(parts.pwconv2, "bias"),
            parts.gamma,
            *((None, None) if grn is None else (parameter(grn, "gamma"), parameter(grn, "beta"))),
        )
        variant = (adaptive, activation, *[t is None for t in tensors])
        layout = cls.layouts.get(variant)
        if layout is None:
            layout = cls.layouts[variant] = _run_trial(module, conv.in_channels, activation)
        if isinstance(layout, str):
            return layout
        return Arguments(conv.out_channels, tensors, _Time(parts, layout, adaptive), activation=activation)

    def inference_block(self) -> None:
        """No part of a stage: x has three dimensions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused op, or the original forward where only that one is correct."""
        condition = args[1] if len(args) == 2 else kwargs.get(_CONDITION)
        if 1 <= len(args) <= 2 and len(args) + len(kwargs) <= 2 and {*kwargs} <= {_CONDITION}:
            arguments = self.arguments(self)
            if not isinstance(arguments, str) and isinstance(args[0], Tensor) and args[0].dim() == 3:
                x = args[0].transpose(1, 2) if arguments.parts.time_first else args[0]
                if _valid(arguments, condition, x) and self.serves(x.unsqueeze(2), arguments):
                    y = self._fused(x.unsqueeze(2), arguments, condition).squeeze(2)
                    return y.transpose(1, 2) if arguments.parts.time_first else y
        node = self.node(*args, **kwargs)
        return super(Adapter, self).forward(*args, **kwargs) if node is None else node  # that of the original class

    def _fused(self, x: Tensor, arguments: Arguments, condition: Tensor | None) -> Tensor:
        """Compute the block of an image of one row; the result is channels_last, and so are the layers after it."""
        weight, bias, *norm, w1, b1, w2, b2, gamma, grn_weight, grn_bias = arguments.tensors
        parts = arguments.parts.parts
        return functional.adaptive_convnext_block(
            channels_last(x),
            weight.unsqueeze(2),
            bias,
            *(rows_of(condition, *norm) if arguments.parts.adaptive else norm),
            *(w1, b1, w2, b2),
            gamma=gamma,
            grn_weight=grn_weight,
            grn_bias=grn_bias,
            dilation=(1, parts.dwconv.dilation[0]),
            eps=parts.norm.eps,
            grn_eps=1e-6,  # in the forward of every known copy, which the trial has confirmed
            activation=arguments.activation,
            memory=getattr(self, MEMORY),
            backend=getattr(self, BACKEND),
        )


def _valid(arguments: Arguments, condition: Any, x: Tensor) -> bool:
    """Whether the condition is one that the op is given; otherwise the original names what is wrong."""
    if not arguments.parts.adaptive:
        return True
    if type(condition) is not Tensor or condition.is_floating_point():
        return False
    if condition.numel() != 1 and tuple(condition.shape) != (x.shape[0], 1):
        return False
    if condition.device.type != "cpu" or torch.compiler.is_compiling():  # its values cannot be read here
        return True
    return int(condition.min()) >= 0 and int(condition.max()) < arguments.tensors[2].shape[0]


def _run_trial(module: nn.Module, channels: int, activation: str) -> bool | str:
    """Compare the module's own forward with the op in fp64, for both layouts, with random parameters."""
    clone = copy.copy(module)
    clone.__class__ = structure.class_of(module)
    clone.__dict__.update({name: OrderedDict() for name in vars(clone) if "_hooks" in name})
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64, device="cpu") - 0.5

    tensors = {name: draw(*p.shape) for name, p in module.named_parameters()}
    adaptive = _adaptive(module.norm)
    affine = [
        tensors[f"norm.{name}"] for name in (("scale.weight", "shift.weight") if adaptive else ("weight", "bias"))
    ]
    x = draw(2, channels, channels + 3)
    fused = functional.convnext_block(
        x.unsqueeze(2),
        tensors["dwconv.weight"].unsqueeze(2),
        tensors.get("dwconv.bias"),
        *((t[0] for t in affine) if adaptive else affine),
        *(tensors.get(f"pwconv{i}.{name}") for i in (1, 2) for name in ("weight", "bias")),
        gamma=tensors.get("gamma"),
        grn_weight=tensors.get("grn.gamma"),
        grn_bias=tensors.get("grn.beta"),
        dilation=(1, module.dwconv.dilation[0]),
        eps=module.norm.eps,
        activation=activation,
        backend="eager",
    ).squeeze(2)
    options = {_CONDITION: torch.zeros(1, dtype=torch.long)} if adaptive else {}
    reasons = []  # the most telling first when sorted
    for time_first in (False, True):
        given, expected = (t.transpose(1, 2) if time_first else t for t in (x, fused))
        try:
            with torch.no_grad():
                actual = torch.func.functional_call(clone, tensors, (given,), options)
        except Exception as error:  # unknown code with unexpected input may raise anything
            reasons.append((2, f"its forward failed on {tuple(given.shape)} float64: {error}"))
            continue
        if not isinstance(actual, Tensor) or actual.shape != expected.shape:
            reasons.append((1, "its forward does not return a tensor of its input's shape"))
            continue
        error = (actual - expected).abs().max().item()
        if error <= 1e-9 * expected.abs().max().item():  # false for NaN
            return time_first
        reasons.append((0, f"its forward computes something else than the fused op (error {error:.1e})"))
    return min(reasons)[1]


def match(module: nn.Module) -> Match | None:
    """Recognise the blocks by their structure."""
    children = module._modules
    if children.keys() >= _CHILDREN and isinstance(children["dwconv"], nn.Conv1d):
        return Match(TimeBlockAdapter, type(module))
    return None
