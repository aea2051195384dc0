"""`accelerate` and `restore`."""

import logging

from torch import nn

from convnext_kernels.interop.adapter import (
    BACKEND,
    MEMORY,
    Accelerated,
    Adapter,
    SequentialAdapter,
    StemAdapter,
    accelerated_class,
)
from convnext_kernels.interop.structure import patch_conv
from convnext_kernels.interop.table import find, original_class
from convnext_kernels.ops import checks

_log = logging.getLogger("convnext_kernels")


def check_model(model: object) -> None:
    """Raise TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module, *, memory: str = "auto", backend: str = "auto") -> nn.Module:
    """Compute the ConvNeXt blocks of `model` with this package's kernels; works in place and returns `model`.

    It replaces the ConvNeXt V1 and V2 blocks, the downsampling layers (a norm, then a KxK convolution with stride K)
    and the norms over channels of torchvision, timm, transformers (ConvNeXt, ConvNeXt V2, DINOv3) and the official
    repositories, the blocks over time of Vocos and F5-TTS, MedNeXt's blocks, and in any network each depthwise
    ``torch.nn.Conv2d`` with a side of at least 7, each depthwise ``torch.nn.Conv3d`` and ``torch.nn.ConvTranspose3d``,
    and for what these return each GroupNorm with one group per channel. All other modules stay as they are;
    `acceleration_report` gives the reasons.

    On a CPU whose instruction set has no products of bf16, the convolution of images into patches, the stem, computes
    bf16 in fp32; the report does not list it.

    Only the classes of these modules change. Parameters, state-dict keys, hooks, modes, devices and dtypes stay,
    ``isinstance`` gives the same answers, and copies, pickles and ``torch.save`` work as before (to load a pickle,
    this package must be installed). A replaced module runs its original forward where the fused op would not give
    the same result: a hook on an inner layer, a LoRA or quantised layer, tensors of other ranks or mixed dtypes.

    Parameters may be on any device, "meta" too. A second call sets `memory` and the backend and replaces modules
    that were added. If there is nothing to replace, the model does not change and a warning is logged. Exporters see
    PyTorch's operators (`keep_ops`), ``torch.fx`` keeps replaced modules as nodes. Call `restore` before
    ``torch.jit.script``, or before tools that look for the original classes by name.

    Args:
        model: any module; also a single block.
        memory: what blocks keep for the backward pass, see `FusedConvNeXtBlock`.
        backend: "auto" or a name of `convnext_kernels.list_backends()`.

    Raises TypeError when `model` is not a module or `backend` not a string, ValueError for another `memory` or an
    unknown `backend`, and BackendError when the backend cannot run here. After an error the model is unchanged.
    """
    check_model(model)
    checks.memory(memory, nothing=False)
    checks.backend(backend, available=True)
    findings = list(find(model))
    replaceable = [f for f in findings if f.accelerated and (isinstance(f.module, Adapter) or f.refusal is None)]
    for _, module, accelerated, _ in replaceable:
        if not isinstance(module, Adapter):
            module.__class__ = accelerated
        setattr(module, BACKEND, backend)
        setattr(module, MEMORY, memory)
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) > 1 and all(hasattr(m, "inference_block") for m in module):
            module.__class__ = accelerated_class(SequentialAdapter, nn.Sequential)
        if replaceable and type(module) is nn.Conv2d and _is_stem(module):
            module.__class__ = accelerated_class(StemAdapter, nn.Conv2d)
    if not replaceable and all(f.accelerated for f in findings):
        reasons = "; ".join(sorted({f.refusal for f in findings})) or "it has no ConvNeXt block"
        _log.warning("accelerate: nothing was replaced in %s: %s", type(model).__name__, reasons)
    return model


def _is_stem(conv: nn.Conv2d) -> bool:
    """Whether `conv` turns images into patches, on a machine where bf16 is slow in it."""
    return conv.in_channels <= 4 and checks.widens() and patch_conv(conv) is None and "forward" not in vars(conv)


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: set the original class of every module, in place, and return `model`.

    Raises TypeError when `model` is not a module. Raises RuntimeError, before anything changes, when another tool
    has since changed the class or the forward of an accelerated module: restoring would undo that only in part.
    """
    check_model(model)
    classes = {}
    for name, module in model.named_modules():
        if isinstance(module, Accelerated):
            classes[module] = original_class(module)
            if classes[module] is None or "forward" in vars(module):
                changed = "its forward" if classes[module] else f"its class, to {type(module).__name__}"
                raise RuntimeError(
                    f"restore: another tool changed {name or 'the model itself'} after accelerate ({changed}); "
                    "undo that change first"
                )
    for module, original in classes.items():
        module.__class__ = original
        for name in (BACKEND, MEMORY):
            vars(module).pop(name, None)
    return model
