"""The common part of all libraries' blocks: the ConvNeXt block under different names."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, MEMORY, Adapter, Arguments
from convnext_kernels.interop.structure import parameter
from convnext_kernels.nn.sequential import run_block
from convnext_kernels.ops.blocks import Block, block


class Parts(NamedTuple):
    """A block's inner modules and parameters under the official names."""

    dwconv: nn.Module
    norm: nn.Module
    pwconv1: nn.Module
    act: nn.Module
    pwconv2: nn.Module
    drop_path: nn.Module
    gamma: Tensor | None = None
    grn: nn.Module | None = None
    others: tuple[nn.Module, ...] = ()  # containers, and modules that do nothing: identities, dropout outside training


class BlockAdapter(Adapter):
    """A ConvNeXt block in one op; subclasses find the parts in a library's module."""

    kind = "block"
    grn_names: ClassVar[tuple[str, str]] = ("weight", "bias")

    @classmethod
    def parts(cls, module: nn.Module) -> Parts | str:
        """Return the parts, or why the op cannot compute this block."""
        raise NotImplementedError

    @classmethod
    def norm_refusal(cls, norm: nn.Module, channels: int) -> str | None:
        """Return why `norm` is not this library's LayerNorm over the last dimension."""
        return structure.layer_norm(norm, cls.types["norm"], channels)

    @classmethod
    def dwconv_refusal(cls, conv: nn.Module) -> str | None:
        """Return why `conv` cannot be the block's depthwise convolution."""
        return structure.depthwise(conv)

    @classmethod
    def known(cls, role: str, module: nn.Module) -> bool:
        """Whether `module` has the library's own class for that role."""
        return structure.is_one_of(module, cls.types[role])

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return the op's tensors and the parts, or the first reason why the fused op cannot be used."""
        parts = cls.parts(module)
        if isinstance(parts, str):
            return parts
        dwconv, norm, pwconv1, act, pwconv2, drop_path, gamma, grn, others = parts
        refusal = (
            structure.watched((dwconv, norm, pwconv1, act, pwconv2, drop_path, *others))
            or cls.dwconv_refusal(dwconv)
            or cls.norm_refusal(norm, dwconv.out_channels)
            or structure.pointwise(pwconv1)
            or structure.pointwise(pwconv2)
        )
        if refusal:
            return refusal
        activation = structure.activation(act, cls.types)
        if activation is None:
            return f"the activation is {act!r}"
        if type(drop_path) is not nn.Identity and not cls.known("drop_path", drop_path):
            return f"the drop path is a {structure.class_of(drop_path).__name__}"
        grn_weight = grn_bias = None
        if grn is not None:
            if refusal := structure.watched((grn,)):
                return refusal
            if not cls.known("grn", grn):
                return f"the response normalisation is a {structure.class_of(grn).__name__}"
            grn_weight, grn_bias = parameter(grn, cls.grn_names[0]), parameter(grn, cls.grn_names[1])
        affine = cls.affine(norm)
        if isinstance(affine, str):
            return affine
        kind, norm_tensors = affine
        tensors = (
            parameter(dwconv, "weight"),
            parameter(dwconv, "bias"),
            *norm_tensors,
            parameter(pwconv1, "weight"),
            parameter(pwconv1, "bias"),
            parameter(pwconv2, "weight"),
            parameter(pwconv2, "bias"),
            gamma,
            grn_weight,
            grn_bias,
        )
        return Arguments(dwconv.out_channels, tensors, parts, kind, activation)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; in inference without asking each module again, where nothing has changed since."""
        result = run_block(self, args[0]) if len(args) == 1 and not kwargs else None
        return super().forward(*args, **kwargs) if result is None else result

    def inference_block(self) -> tuple[Block, str] | None:
        """What `fused` computes with in inference, and the backend; for `nn.sequential`."""
        arguments = self.arguments(self)
        if isinstance(arguments, str):
            return None
        _, tensors, parts, norm, activation = arguments
        if type(parts.drop_path) is not nn.Identity and parts.drop_path.training:
            return None
        grn_eps = getattr(parts.grn, "eps", 1e-6)
        found = block(
            *tensors,
            dilation=parts.dwconv.dilation,
            eps=parts.norm.eps,
            grn_eps=grn_eps,
            norm=norm,
            activation=activation,
        )
        return found, getattr(self, BACKEND)

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Compute the whole block."""
        _, tensors, parts, norm, activation = arguments
        gamma, grn_weight, grn_bias = tensors[8:]
        return functional.convnext_block(
            x,
            *tensors[:8],
            gamma=gamma,
            grn_weight=grn_weight,
            grn_bias=grn_bias,
            drop_scale=drop_scale(parts.drop_path, x, gamma),
            dilation=parts.dwconv.dilation,
            eps=parts.norm.eps,
            grn_eps=getattr(parts.grn, "eps", 1e-6),  # libraries without this attribute have 1e-6 in their forward
            norm=norm,
            activation=activation,
            memory=getattr(self, MEMORY, "auto"),  # a module of release/hf_layers.py has no such attributes
            backend=getattr(self, BACKEND, "auto"),
        )


def drop_scale(drop_path: nn.Module, x: Tensor, gamma: Tensor | None) -> Tensor | None:
    """Return the factor of each sample, drawn by the library's own module, so that a seed gives the same masks.

    The module gets ones in the dtype of the branch that it would scale, because its random numbers may depend on
    the dtype.
    """
    if type(drop_path) is nn.Identity or not drop_path.training:
        return None
    dtype = x.dtype
    if structure.autocasting(x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        if gamma is not None:
            dtype = torch.promote_types(dtype, gamma.dtype)
    ones = x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)
    scale = drop_path(ones)
    return None if scale is ones else scale
