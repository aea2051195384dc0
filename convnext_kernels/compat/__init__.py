"""Drop-in for the depthwise convolution that RepLKNet, UniRepLKNet and SLaK import, and the merging of its branches.

Their scripts import the class from a module ``depthwise_conv2d_implicit_gemm``, an extension in CUDA. This folder has a
module of that name, so it can stand in for the extension's folder, with nothing to compile::

    export LARGE_KERNEL_CONV_IMPL=$(python -c "from convnext_kernels import compat; print(compat.FOLDER)")
    export PYTHONPATH=$LARGE_KERNEL_CONV_IMPL:$PYTHONPATH

RepLKNet reads the first variable; UniRepLKNet and SLaK need the second.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from convnext_kernels.nn import DepthwiseConv2d

__all__ = ["FOLDER", "DepthWiseConv2dImplicitGEMM", "fold_batch_norm", "merge", "merge_parallel"]

FOLDER = str(Path(__file__).resolve().parent)


class DepthWiseConv2dImplicitGEMM(DepthwiseConv2d):
    """Depthwise convolution with stride 1 and zero padding that keeps the size, by `functional.depthwise_conv2d`.

    Constructor, parameters and results are those of the class of that name in MegEngine's CUTLASS examples. That one
    serves fp32 and fp16 on a GPU; this one every dtype and device, `torch.compile` and autocast. Its `padding` is the
    true one (theirs is 0), so that RepLKNet's ``merge_kernel()``, which copies it, gives maps of the same size.

    Args:
        channels: of input and output.
        kernel: side of the kernel or (height, width), odd.
        bias: whether to add one.

    Raises what `DepthwiseConv2d` raises.
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int], bias: bool = False) -> None:
        super().__init__(channels, kernel, bias=bias)


def _depthwise(conv: nn.Module) -> bool:
    """Whether the convolution could be a `DepthWiseConv2dImplicitGEMM`."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.in_channels == conv.out_channels == conv.groups
        and conv.stride == conv.dilation == (1, 1)
        and all(side % 2 for side in conv.kernel_size)
        and conv.padding == tuple(side // 2 for side in conv.kernel_size)
        and conv.padding_mode == "zeros"
    )


def _check(name: str, conv: object) -> None:
    if not isinstance(conv, nn.Module):
        raise TypeError(f"{name}: expected a convolution, got {type(conv).__name__}")
    if not _depthwise(conv):
        raise ValueError(
            f"{name}: expected a depthwise convolution with an odd kernel, stride 1 and padding that keeps the size, "
            f"got {conv}"
        )


def _made(weight: Tensor, bias: Tensor, training: bool) -> DepthWiseConv2dImplicitGEMM:
    made = DepthWiseConv2dImplicitGEMM(weight.shape[0], tuple(weight.shape[2:]), bias=True)
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made.train(training)


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> DepthWiseConv2dImplicitGEMM:
    """One depthwise convolution that computes ``norm(conv(x))`` in evaluation (arXiv 2203.06717, appendix).

    Raises TypeError or ValueError if `conv` is no depthwise convolution with stride 1 that keeps the size, or `norm` no
    BatchNorm of its channels with running statistics.
    """
    _check("conv", conv)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"norm: expected a BatchNorm, got {type(norm).__name__}")
    if norm.num_features != conv.out_channels:
        raise ValueError(f"norm: expected {conv.out_channels} channels, got {norm.num_features}")
    if norm.running_mean is None:
        raise ValueError("norm: has no running statistics")
    statistics = norm.running_mean, norm.running_var, norm.eps
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
    return _made(weight.detach(), bias.detach(), conv.training)


@torch.no_grad()
def merge_parallel(*convs: nn.Conv2d) -> DepthWiseConv2dImplicitGEMM:
    """One depthwise convolution that computes the sum of parallel ones (arXiv 2203.06717, section 3.1).

    Smaller kernels are padded with zeros to the height and the width of the largest.

    Raises TypeError or ValueError if there is none, one is no depthwise convolution with stride 1 that keeps the size,
    or their channels differ.
    """
    if not convs:
        raise ValueError("convs: expected at least one convolution")
    for i, conv in enumerate(convs):
        _check(f"convs[{i}]", conv)
        if conv.in_channels != convs[0].in_channels:
            raise ValueError(f"convs[{i}]: expected {convs[0].in_channels} channels, got {conv.in_channels}")
    height, width = (max(conv.kernel_size[d] for conv in convs) for d in (0, 1))
    weight = convs[0].weight.new_zeros(convs[0].in_channels, 1, height, width)
    bias = convs[0].weight.new_zeros(convs[0].in_channels)
    for conv in convs:
        top, left = (height - conv.kernel_size[0]) // 2, (width - conv.kernel_size[1]) // 2
        weight[:, :, top : height - top, left : width - left] += conv.weight
        if conv.bias is not None:
            bias += conv.bias
    return _made(weight, bias, convs[0].training)


def merge(model: nn.Module) -> nn.Module:
    """Fold and merge the large-kernel convolutions of a RepLKNet or SLaK for inference, in place; returns `model`.

    A `Sequential` of a depthwise convolution ``conv`` and a BatchNorm ``bn`` becomes one convolution. In a module with
    such branches ``lkb_origin`` and ``small_conv`` (RepLKNet's ``ReparamLargeKernelConv``) both become one,
    ``lkb_reparam``, as its own ``merge_kernel()`` makes it. Everything else stays as it is.

    Raises TypeError if `model` is not a module and ValueError if it is in training, where BatchNorm depends on the
    batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        raise ValueError("model: is in training, expected model.eval()")
    for module in list(model.modules()):
        branches = [module._modules[name] for name in ("lkb_origin", "small_conv") if name in module._modules]
        if "lkb_origin" in module._modules and all(map(_is_pair, branches)):
            module.lkb_reparam = merge_parallel(*(fold_batch_norm(pair.conv, pair.bn) for pair in branches))
            for name in ("lkb_origin", "small_conv"):
                module._modules.pop(name, None)
            continue
        for name, child in module.named_children():
            if _is_pair(child):
                setattr(module, name, fold_batch_norm(child.conv, child.bn))
    return model


def _is_pair(module: nn.Module) -> bool:
    children = module._modules
    return (
        type(module) is nn.Sequential
        and list(children) == ["conv", "bn"]
        and _depthwise(children["conv"])
        and isinstance(children["bn"], nn.modules.batchnorm._BatchNorm)
        and children["bn"].running_mean is not None
    )
