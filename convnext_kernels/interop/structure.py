"""Whether the modules inside a block allow a fused op to compute the same result.

Each function returns None, or the reason why not. They run again in every call, because hooks, LoRA layers and
quantised weights can be added after `accelerate`. So they only read attributes and never loop over all descendants.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from convnext_kernels.exporting import traced
from convnext_kernels.ops.checks import MAX_KERNEL_SIZE
from convnext_kernels.torch_versions import TRACED, forward_mode_active, transforms, transforms_active
from convnext_kernels.variants import ACTIVATIONS

PLAIN = (Tensor, nn.Parameter)
_ACTIVATIONS = {nn.SiLU: "silu", nn.Mish: "mish", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}


def class_of(module: nn.Module) -> type:
    """The class of `module` before it was parametrised or itself accelerated."""
    kind = type(module)
    if "parametrizations" in module._modules:
        kind = kind.__bases__[0]
    return getattr(kind, "original", kind)


def is_one_of(module: nn.Module, types: tuple[type, ...]) -> bool:
    """Whether the class is exactly one of `types`: a subclass may compute something else."""
    return type(module) in types or class_of(module) in types


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The same as ``getattr(module, name)``, but faster: it would take most of the time of these checks."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)  # parametrised ones are properties


def watched(modules: Iterable[nn.Module]) -> str | None:
    """Whether a hook or a replaced forward needs the calls of `modules`, which the fused op does not make."""
    if (
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    ):
        return "a hook is registered on all modules"
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a hook is registered on its {class_of(module).__name__}"
        if "forward" in module.__dict__:
            return f"the forward of its {class_of(module).__name__} was replaced"
    return None


def depthwise(conv: nn.Module, kind: type[nn.Module] = nn.Conv2d, strides: tuple[int, ...] = (1,)) -> str | None:
    """A depthwise convolution of class `kind` with an odd kernel, one of `strides` and "same" zero padding."""
    if not is_one_of(conv, (kind,)):
        return f"the depthwise convolution is a {class_of(conv).__name__}"
    if conv.stride[0] not in strides or len(set(conv.stride)) > 1:
        return f"the depthwise convolution has stride {conv.stride}"
    if not conv.in_channels == conv.out_channels == conv.groups:
        return f"the convolution is not depthwise: {conv.in_channels} -> {conv.out_channels}, {conv.groups} groups"
    if any(side % 2 == 0 or side > MAX_KERNEL_SIZE for side in conv.kernel_size):
        return f"the kernel size {conv.kernel_size} is not odd and at most {MAX_KERNEL_SIZE}"
    padding = tuple(step * (side - 1) // 2 for side, step in zip(conv.kernel_size, conv.dilation, strict=True))
    if conv.padding not in (padding, "same") or (conv.padding_mode != "zeros" and any(padding)):
        return f"the padding {conv.padding}, {conv.padding_mode!r} does not keep the size with zeros"
    return None


def layer_norm(norm: nn.Module, types: tuple[type, ...], channels: int) -> str | None:
    """A LayerNorm over `channels`; its weight and bias are checked with the other tensors."""
    if not is_one_of(norm, types):
        return f"the norm is a {class_of(norm).__name__}"
    if tuple(norm.normalized_shape) != (channels,):
        return f"the norm is over {tuple(norm.normalized_shape)}, not over the {channels} channels"
    return None


def pointwise(layer: nn.Module) -> str | None:
    """A Linear, or the same as a convolution of one pixel."""
    if is_one_of(layer, (nn.Linear,)):
        return None
    if not is_one_of(layer, (nn.Conv2d, nn.Conv3d)):
        return f"a pointwise layer is a {class_of(layer).__name__}"
    if {*layer.kernel_size} != {1} or {*layer.stride} != {1} or layer.groups != 1:
        return f"a pointwise layer is a convolution ({layer.extra_repr()})"
    if layer.padding not in ((0,) * len(layer.stride), "same", "valid"):
        return f"a pointwise layer has padding {layer.padding}"
    return None


def activation(act: nn.Module, types: dict[str, tuple[type, ...]]) -> str | None:
    """The name (`variants.ACTIVATIONS`) of PyTorch's module, or of a library's, types["act_<name>"]; None: unknown."""
    kind = class_of(act)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if kind in _ACTIVATIONS:
        return _ACTIVATIONS[kind]
    # torch.compile of PyTorch 2.8 cannot trace next() with a default
    found = [name for name in ACTIVATIONS if is_one_of(act, types.get(f"act_{name}", ()))]
    return found[0] if found else None


def patch_conv(conv: nn.Module) -> str | None:
    """A KxK convolution with stride K, over all channels, without padding."""
    if not is_one_of(conv, (nn.Conv2d,)):
        return f"the convolution is a {class_of(conv).__name__}"
    side = conv.kernel_size[0]
    if conv.kernel_size != (side, side) or conv.stride != (side, side):
        return f"the convolution has kernel size {conv.kernel_size} and stride {conv.stride}"
    if conv.groups != 1 or conv.padding not in ((0, 0), "valid") or (conv.dilation != (1, 1) and side > 1):
        return f"the convolution has groups={conv.groups}, padding={conv.padding}, dilation={conv.dilation}"
    return None


def serves(x: object, channels: int, tensors: tuple[Tensor | None, ...], dimensions: int = 4) -> bool:
    """Whether the fused ops support this input with these parameters."""
    if type(x) not in PLAIN and not isinstance(x, TRACED):
        return False  # nested and distributed tensors
    if traced():
        return False  # the original forward reads no sizes
    if x.dim() != dimensions or x.shape[1] != channels or x.numel() == 0:
        return False
    if forward_mode_active() or (transforms_active() and not reverse_mode_once()):
        return False
    dtype = x.dtype
    mixed = False
    for t in tensors:
        if t is not None:
            if type(t) not in PLAIN and not isinstance(t, TRACED):
                return False  # quantised and distributed weights
            mixed = mixed or t.dtype != dtype
    return not mixed or autocasting(x)


def reverse_mode_once() -> bool:
    """Whether the active transforms of `torch.func` need no second derivative and no forward mode.

    Only the original operators have formulas for these. Under the compiler, which cannot see the transforms, this is
    False, so the original operators run.
    """
    if torch.compiler.is_compiling():
        return False
    running = transforms()
    return running.count("Grad") <= 1 and set(running) <= {"Grad", "Vmap"}


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x's device; PyTorch's autocast does not know "meta"."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
