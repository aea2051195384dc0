"""MedNeXt's block (arXiv 2303.09975), the authors' and MONAI's, and depthwise `torch.nn.Conv3d` wherever else.

The block's depthwise convolution is one op and its inverted bottleneck another, which sees a volume as an image of
D * H rows. Between them PyTorch normalises each channel of a sample over its pixels.
"""

import copy
from collections import OrderedDict
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels import functional
from convnext_kernels.interop import structure
from convnext_kernels.interop.adapter import BACKEND, MEMORY, Adapter, Arguments, Match
from convnext_kernels.interop.layers import channels_last
from convnext_kernels.interop.structure import parameter
from convnext_kernels.ops.checks import MAX_KERNEL_SIZE_3D
from convnext_kernels.variants import identity_norm


def channels_last_3d(x: Tensor) -> Tensor:
    """``x.contiguous(memory_format=torch.channels_last_3d)``, which vmap does not support."""
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


class DepthwiseConv3dAdapter(Adapter):
    """A depthwise convolution of volumes with an odd kernel, zero padding of K // 2, stride 1 or 2."""

    kind = "depthwise convolution"

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return weight, bias and stride, or the reason: another kernel, stride, dilation or padding."""
        sides, stride = module.kernel_size, module.stride[0]
        if any(side % 2 == 0 or side > MAX_KERNEL_SIZE_3D for side in sides):
            return f"the kernel size {sides} is not odd and at most {MAX_KERNEL_SIZE_3D}"
        if stride not in (1, 2) or any(step != stride for step in module.stride):
            return f"the depthwise convolution has stride {module.stride}"
        if any(step != 1 for step in module.dilation):
            return f"the depthwise convolution has dilation {module.dilation}"
        padding = tuple(side // 2 for side in sides)
        if module.padding not in (padding, "same") or (module.padding_mode != "zeros" and any(padding)):
            return f"the padding {module.padding}, {module.padding_mode!r} does not keep the size with zeros"
        return Arguments(module.in_channels, (parameter(module, "weight"), parameter(module, "bias")), stride)

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Volumes instead of images."""
        return structure.serves(x, arguments.channels, arguments.tensors, dimensions=5)

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Convolve; the result is channels_last_3d, and so are the layers after it."""
        stride, backend = arguments.parts, getattr(self, BACKEND)
        return functional.depthwise_conv3d(channels_last_3d(x), *arguments.tensors, stride=stride, backend=backend)


class DepthwiseConvTranspose3dAdapter(DepthwiseConv3dAdapter):
    """A depthwise transposed convolution of volumes with an odd kernel, padding K // 2 and stride 2."""

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return weight, bias and output padding, or the reason: another kernel, stride, dilation or padding."""
        sides, more = module.kernel_size, module.output_padding
        if any(side % 2 == 0 or side > MAX_KERNEL_SIZE_3D for side in sides):
            return f"the kernel size {sides} is not odd and at most {MAX_KERNEL_SIZE_3D}"
        if {*module.stride} != {2} or {*module.dilation} != {1}:
            return f"the transposed convolution has stride {module.stride} and dilation {module.dilation}, not 2 and 1"
        if module.padding != tuple(side // 2 for side in sides) or len({*more}) > 1:
            return f"the transposed convolution has padding {module.padding} and output padding {more}"
        return Arguments(module.in_channels, (parameter(module, "weight"), parameter(module, "bias")), more[0])

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Convolve; the result is channels_last_3d, and so are the layers after it."""
        options = {"output_padding": arguments.parts, "backend": getattr(self, BACKEND)}
        return functional.depthwise_conv_transpose3d(channels_last_3d(x), *arguments.tensors, **options)


_CHILDREN = {"conv1", "norm", "conv2", "act", "conv3"}
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GRN = (("grn_gamma", "grn_beta"), ("global_resp_gamma", "global_resp_beta"))  # the authors' names, MONAI's


class _Block(NamedTuple):
    """What `arguments` finds of a MedNeXt block."""

    groups: bool  # GroupNorm with one group per channel; otherwise LayerNorm over channels
    residual: bool
    activation: str


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm with one group per channel, (N, C, ...) in channels_last, by PyTorch's sums and products.

    Its own group norm adds a channel's pixels in one chain there, and squares before it subtracts the mean: for 48^3
    pixels with |mean| / std = 5 the error is 2.6e-3 in fp32, and in bf16 the backward pass takes 7 times as long
    (PyTorch 2.14 on a CPU). In inference with 16 bits, which round more than that, its own is taken: it is faster.
    """
    if y.dtype.itemsize == 2 and not torch.is_grad_enabled():
        y = F.group_norm(y, y.shape[1], weight, bias, eps).to(y.dtype)
        return y.contiguous(memory_format=torch.channels_last_3d if y.dim() == 5 else torch.channels_last)
    axes = tuple(range(2, y.dim()))
    each = (1, -1, *(1 for _ in axes))
    wide = y.float() if y.dtype.itemsize == 2 else y
    centred = wide - wide.mean(axes, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps) * weight.view(each)
    return torch.addcmul(bias.view(each), centred, scale).to(y.dtype)


class GroupNormAdapter(Adapter):
    """GroupNorm with one group per channel, of what the convolutions above return (`_group_norm`)."""

    kind = "group norm"

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return weight and bias, or the reason: it has none."""
        weight, bias = parameter(module, "weight"), parameter(module, "bias")
        if weight is None or bias is None:
            return "the norm has no weight or no bias"
        return Arguments(module.num_channels, (weight, bias), None)

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Volumes in channels_last_3d; PyTorch's norm is right for others, and the one whose dtype autocast decides."""
        if not structure.serves(x, arguments.channels, arguments.tensors, dimensions=5) or structure.autocasting(x):
            return False
        return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Normalise; the result is channels_last_3d."""
        return channels_last_3d(_group_norm(x, *arguments.tensors, self.eps))


class MedNeXtBlockAdapter(Adapter):
    """MedNeXt's block for volumes or images, with GroupNorm of one group per channel or LayerNorm, with GRN or not.

    Its blocks that change the size of a volume keep their own forward; their depthwise convolutions and norms are
    replaced.
    """

    kind = "block"
    trials: ClassVar[dict[tuple, str | None]]  # of one original class

    def __init_subclass__(cls) -> None:
        """Give each original class its own table."""
        cls.trials = {}

    @classmethod
    def arguments(cls, module: nn.Module) -> Arguments | str:
        """Return the ops' tensors, or the first reason why they cannot be used."""
        children, parameters = module._modules, module._parameters
        found = [names for names in _GRN if {*names} == {*parameters}]  # not next(): see `structure.activation`
        grn = found[0] if found else None
        if {*children} != _CHILDREN or (parameters and grn is None) or module._buffers:
            return f"it has {', '.join((*children, *parameters, *module._buffers))}"
        conv, norm, expand, act, project = (children[name] for name in ("conv1", "norm", "conv2", "act", "conv3"))
        if not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            return f"its convolution is a {structure.class_of(conv).__name__}, so the block changes the size"
        if isinstance(conv, nn.Conv3d):
            found = DepthwiseConv3dAdapter.arguments(conv)
            refusal = found if isinstance(found, str) else None
            if not conv.in_channels == conv.out_channels == conv.groups:
                refusal = f"the convolution is not depthwise: {conv.groups} groups"
            elif conv.stride != (1, 1, 1):
                refusal = f"the depthwise convolution has stride {conv.stride}"
        else:
            refusal = structure.depthwise(conv)
        channels = conv.in_channels
        refusal = (
            refusal
            or structure.watched((conv, norm, expand, act, project))
            or structure.pointwise(expand)
            or structure.pointwise(project)
        )
        if refusal:
            return refusal
        if project.out_channels != channels:
            return f"it has {channels} channels and returns {project.out_channels}"
        groups = structure.is_one_of(norm, (nn.GroupNorm,))
        if groups and not norm.num_groups == norm.num_channels == channels:
            return f"the norm has {norm.num_groups} groups of {norm.num_channels} channels"
        if not groups and getattr(norm, "data_format", None) != "channels_first":
            return f"the norm is a {structure.class_of(norm).__name__}"
        activation = structure.activation(act, {})
        if activation is None:
            return f"the activation is {act!r}"
        tensors = (
            parameter(conv, "weight"),
            parameter(conv, "bias"),
            parameter(norm, "weight"),
            parameter(norm, "bias"),
            parameter(expand, "weight"),
            parameter(expand, "bias"),
            parameter(project, "weight"),
            parameter(project, "bias"),
            *((None, None) if grn is None else (parameters[name] for name in grn)),
        )
        if tensors[2] is None or tensors[3] is None:
            return "the norm has no weight or no bias"
        residual = bool(getattr(module, "do_res", True))
        return Arguments(channels, tensors, _Block(groups, residual, activation), activation=activation)

    @classmethod
    def trial(cls, module: nn.Module) -> str | None:
        """Compare with the block's own forward, once for blocks of a class that differ in sizes only."""
        arguments = cls.arguments(module)
        dimensions = len(module.conv1.kernel_size)
        key = (dimensions, arguments.parts, *(tensor is None for tensor in arguments.tensors))
        if key not in cls.trials:
            cls.trials[key] = _run_trial(cls, module, dimensions)
        return cls.trials[key]

    def serves(self, x: object, arguments: Arguments) -> bool:
        """Volumes, or images."""
        return structure.serves(x, arguments.channels, arguments.tensors, arguments.tensors[0].dim())

    def fused(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Compute the block; the result is channels_last_3d or channels_last."""
        return _fused(x, arguments, self.norm.eps, getattr(self, MEMORY), getattr(self, BACKEND))


def _fused(x: Tensor, arguments: Arguments, eps: float, memory: str, backend: str) -> Tensor:
    weight, bias, norm_weight, norm_bias, *p, grn_weight, grn_bias = arguments.tensors
    x = (channels_last_3d if x.dim() == 5 else channels_last)(x)
    convolve = functional.depthwise_conv3d if x.dim() == 5 else functional.depthwise_conv2d
    y = convolve(x, weight, bias, backend=backend)
    norm = "layer"
    if arguments.parts.groups:
        y = _group_norm(y, norm_weight, norm_bias, eps)
        norm, norm_bias = "rms", None
        norm_weight, eps = identity_norm(y)
    result = functional.inverted_bottleneck(
        y.flatten(2, -2),
        norm_weight,
        norm_bias,
        *(None if t is None else t.flatten(1) if t.dim() > 2 else t for t in p),
        grn_weight=None if grn_weight is None else grn_weight.flatten(),
        grn_bias=None if grn_bias is None else grn_bias.flatten(),
        residual=x.flatten(2, -2) if arguments.parts.residual else None,
        eps=eps,
        norm=norm,
        activation=arguments.activation,
        memory=memory,
        backend=backend,
    )
    # A view; of one sample too with the strides of channels_last_3d, where the operators above may have given others
    result = result.permute(0, 2, 3, 1).flatten(0, 2).unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1)
    if structure.autocasting(x) and x.dtype != torch.float64:
        autocast = torch.get_autocast_dtype(x.device.type)  # of the block's last convolution
        return result.to(torch.promote_types(x.dtype, autocast) if arguments.parts.residual else autocast)
    return result


def _run_trial(cls: type[Adapter], module: nn.Module, dimensions: int) -> str | None:
    """Compare the block's own forward with the ops in fp64, with random parameters."""
    clone = copy.copy(module)
    clone.__class__ = structure.class_of(module)
    clone.__dict__.update({name: OrderedDict() for name in vars(clone) if "_hooks" in name})
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64, device="cpu") - 0.5

    tensors = {name: draw(*p.shape) for name, p in module.named_parameters()}
    x = draw(2, module.conv1.in_channels, *(3, 5, 4)[:dimensions])
    own = {id(p): tensors[name] for name, p in module.named_parameters()}
    arguments = cls.arguments(module)
    arguments = arguments._replace(tensors=tuple(None if t is None else own[id(t)] for t in arguments.tensors))
    expected = _fused(x, arguments, module.norm.eps, "auto", "eager")
    try:
        with torch.no_grad():
            actual = torch.func.functional_call(clone, tensors, (x,))
    except Exception as error:  # unknown code with unexpected input may raise anything
        return f"its forward failed on {tuple(x.shape)} float64: {error}"
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return "its forward does not return a tensor of its input's shape"
    error = (actual - expected).abs().max().item()
    if error <= 1e-9 * expected.abs().max().item():  # false for NaN
        return None
    return f"its forward computes something else than the fused op (error {error:.1e})"


def match(module: nn.Module) -> Match | None:
    """Recognise MedNeXt's blocks by their structure, and depthwise convolutions of volumes."""
    children = module._modules
    if children.keys() >= _CHILDREN and isinstance(children["conv1"], _CONVOLUTIONS):
        return Match(MedNeXtBlockAdapter, type(module))
    if type(module) is nn.GroupNorm and 1 < module.num_groups == module.num_channels:
        return Match(GroupNormAdapter, nn.GroupNorm)
    if isinstance(module, nn.ConvTranspose3d) and 1 < module.groups == module.in_channels == module.out_channels:
        return Match(DepthwiseConvTranspose3dAdapter, nn.ConvTranspose3d)
    if isinstance(module, nn.Conv3d) and 1 < module.groups == module.in_channels == module.out_channels:
        return Match(DepthwiseConv3dAdapter, nn.Conv3d)
    return None
