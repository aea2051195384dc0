"""The formulas of the papers in plain PyTorch, written out independently of the package.

In fp64 they are the reference of the parity tests; in the tested dtype they are "eager", whose error sets the
standard. The functions take the arguments of `convnext_kernels.functional`, and so does nothing else here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int | tuple[int, int] = 1
) -> Tensor:
    down, right = (dilation, dilation) if isinstance(dilation, int) else dilation
    padding = (down * (weight.shape[2] // 2), right * (weight.shape[3] // 2))
    return F.conv2d(x, weight, bias, stride, padding, (down, right), groups=len(weight))


def depthwise_conv3d(x, weight, bias=None, *, stride=1):
    # In 16 bits the sums are fp32 and rounded once: PyTorch's own volumes sum some kernels in 16 bits.
    wide = torch.promote_types(x.dtype, torch.float32)
    tensors = (t if t is None else t.to(wide) for t in (x, weight, bias))
    padding = [side // 2 for side in weight.shape[2:]]
    return F.conv3d(*tensors, stride, padding, groups=len(weight)).to(x.dtype)


def _grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    norm = x.norm(p=2, dim=(1, 2), keepdim=True)
    response = norm / (norm.mean(dim=-1, keepdim=True) + eps)
    return weight * (x * response) + bias + x


def global_response_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    return _grn(x.permute(0, 2, 3, 1), weight, bias, eps).permute(0, 3, 1, 2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    square = x.pow(2).mean(-1, keepdim=True) if norm == "rms" else x.var(-1, keepdim=True)
    return x / (square + eps).sqrt() * weight


def layer_norm2d(x, weight, bias, *, eps=1e-6, norm="layer"):
    return _norm(x.permute(0, 2, 3, 1), weight, bias, eps, norm).permute(0, 3, 1, 2)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def inverted_bottleneck(
    x,
    norm_weight,
    norm_bias,
    pwconv1_weight,
    pwconv1_bias,
    pwconv2_weight,
    pwconv2_bias,
    *,
    gamma=None,
    grn_weight=None,
    grn_bias=None,
    residual=None,
    drop_scale=None,
    eps=1e-6,
    grn_eps=1e-6,
    norm="layer",
    activation="gelu",
):
    y = _norm(x.permute(0, 2, 3, 1), norm_weight, norm_bias, eps, norm)
    y = ACTIVATIONS[activation](F.linear(y, pwconv1_weight, pwconv1_bias))
    if grn_weight is not None:
        y = _grn(y, grn_weight, grn_bias, grn_eps)
    y = F.linear(y, pwconv2_weight, pwconv2_bias)
    if gamma is not None:
        y = gamma * y
    y = y.permute(0, 3, 1, 2)
    if drop_scale is not None:
        y = y * drop_scale.view(-1, 1, 1, 1)
    return y if residual is None else residual + y


def convnext_block(x, dwconv_weight, dwconv_bias, *parameters, dilation=1, **options):
    y = depthwise_conv2d(x, dwconv_weight, dwconv_bias, dilation=dilation)
    return inverted_bottleneck(y, *parameters, residual=x, **options)


def patch_downsample(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-6, norm="layer"):
    side = weight.shape[-1]
    y = layer_norm2d(x, norm_weight, norm_bias, eps=eps, norm=norm)
    # Not F.conv2d: oneDNN's 16-bit kernels return garbage for strides 3 and 4 (torch 2.14 on a machine with AMX;
    # pytorch issue 169688), and what returns garbage sets no standard.
    patches = F.unfold(y, side, stride=side)
    y = (weight.flatten(1) @ patches).unflatten(2, (x.shape[2] // side, x.shape[3] // side))
    return y if bias is None else y + bias.view(-1, 1, 1)
