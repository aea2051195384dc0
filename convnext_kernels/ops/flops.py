"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops of this package.

It counts 2 x the multiply-adds of convolutions and matmuls, as for PyTorch's own ops. A backward pass counts them once
for the gradient of the input and once for that of the weights, as if all gradients were needed. Normalisations, GELU
and GRN count as 0. What a backward pass computes again also counts as 0, because that is a choice of the kernels and no
work of the network. The counter passes shapes (lists of integers, None for missing tensors) instead of tensors.

Importing this file registers the formulas. The package does not import it, because PyTorch's counter imports Triton,
which takes a second.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from convnext_kernels.ops import block, downsample, dwconv, dwconv3d, dwconv3d_transposed, mlp  # noqa: F401  registers the ops

Shape = Sequence[int]
_ops = torch.ops.convnext_kernels


@register_flop_formula(_ops.dwconv)
def _dwconv(x: Shape, weight: Shape, _bias: Shape | None, *options: Any, **__: Any) -> int:
    stride = options[2] if options else 1  # of `dwconv`; the block passes none
    n, c, h, w = x
    return 2 * n * c * -(-h // stride) * -(-w // stride) * weight[2] * weight[3]


@register_flop_formula(_ops.dwconv_backward)
def _dwconv_backward(_dy: Shape, *forward: Any, **__: Any) -> int:
    return 2 * _dwconv(*forward)


@register_flop_formula(_ops.dwconv3d)
def _dwconv3d(x: Shape, weight: Shape, _bias: Shape | None, stride: int, *_: Any, **__: Any) -> int:
    n, c, *sizes = x
    return 2 * n * c * math.prod(-(-size // stride) for size in sizes) * math.prod(weight[2:])


@register_flop_formula(_ops.dwconv3d_backward)
def _dwconv3d_backward(_dy: Shape, *forward: Any, **__: Any) -> int:
    return 2 * _dwconv3d(*forward)


@register_flop_formula(_ops.dwconv3d_transposed)
def _dwconv3d_transposed(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * math.prod(weight[2:])  # each tap of each pixel of x, the smaller volume


@register_flop_formula(_ops.dwconv3d_transposed_backward)
def _dwconv3d_transposed_backward(_dy: Shape, *forward: Any, **__: Any) -> int:
    return 2 * _dwconv3d_transposed(*forward)


@register_flop_formula(_ops.mlp)
def _mlp(x: Shape, _residual: Shape, _norm: Shape, _norm_bias: Shape, pwconv1: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(x) * pwconv1[0]


@register_flop_formula(_ops.mlp_backward)
def _mlp_backward(_dout: Shape, *forward: Any, **__: Any) -> int:
    return 2 * _mlp(*forward)


@register_flop_formula(_ops.block)
def _block(x: Shape, weight: Shape, bias: Shape | None, *bottleneck: Any, **__: Any) -> int:
    return _dwconv(x, weight, bias) + _mlp(x, None, *bottleneck)


@register_flop_formula(_ops.block_backward)
def _block_backward(_dout: Shape, *forward: Any, **__: Any) -> int:
    return 2 * _block(*forward)


@register_flop_formula(_ops.downsample)
def _downsample(x: Shape, _norm: Shape, _norm_bias: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    n, _, h, w = x
    side = weight[-1]
    return 2 * n * (h // side) * (w // side) * math.prod(weight)


@register_flop_formula(_ops.downsample_backward)
def _downsample_backward(_dy: Shape, *forward: Any, **__: Any) -> int:
    return 2 * _downsample(*forward)
