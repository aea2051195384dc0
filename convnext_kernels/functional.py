"""The public functions. Tensors are (N, C, H, W) in any memory format; results keep x's format and dtype.

(The functions of sequences and volumes name their shapes.)

All of them are differentiable, work under ``torch.autocast`` and ``torch.compile``, and take
``backend="auto"`` or the name of one of `convnext_kernels.list_backends()`.

Errors: TypeError for an unsupported or mixed dtype; ValueError for wrong ranks, shapes, devices, kernel
sizes, dilations and eps; BackendError when the backend that was requested by name does not exist or cannot serve the
call; RuntimeError (from PyTorch's dispatcher, which names the argument) when an argument is not a tensor or a number.
"""

from typing import Any

import torch
from torch import Tensor

import convnext_kernels.ops  # noqa: F401  registers torch.ops.convnext_kernels
from convnext_kernels.ops import checks
from convnext_kernels.ops.registration import call
from convnext_kernels.variants import constant, identity_norm


def _memory(memory: str, tensors: tuple) -> str:
    """Return `memory` if a gradient may be computed later, otherwise "nothing"."""
    if _differentiated(tensors):
        return memory
    checks.memory(memory)
    return "nothing"


def _differentiated(tensors: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int | tuple[int, int] = 1,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution with "same" zero padding (arXiv 2201.03545, section 2.3 and 2.5).

    x (N, C, H, W); weight (C, 1, KH, KW) with odd KH and KW up to 51; bias (C,) or None; dilation at least 1, one for
    both axes or (of height, of width). Zeros around x, dilation * (K - 1) / 2 on each side: the result has x's size, or
    (N, C, ceil(H / 2), ceil(W / 2)) with stride 2.
    """
    return call("dwconv", x, weight, bias, *checks.pair("dilation", dilation), checks.one("stride", stride), backend)


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """`depthwise_conv2d` over time: x (N, C, L); weight (C, 1, K) with odd K up to 51; bias (C,) or None.

    The result is (N, C, ceil(L / stride)). A transposed (N, L, C) is the fast memory format.
    """
    checks.sequence("x", x)
    checks.sequence_weight("weight", weight, x, ("bias", bias, None))
    options = 1, checks.one("dilation", dilation), checks.one("stride", stride)
    return call("dwconv", x.unsqueeze(2), weight.unsqueeze(2), bias, *options, backend).squeeze(2)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution of volumes (MedNeXt, arXiv 2303.09975): the depth, height and width of a scan.

    x (N, C, D, H, W); weight (C, 1, KD, KH, KW), each side odd and up to 7; bias (C,) or None. Zeros around x, K // 2
    on each side: the result has x's size, or (N, C, ceil(D / 2), ceil(H / 2), ceil(W / 2)) with stride 2. The fast
    memory format is ``torch.channels_last_3d``. The backend "cuda" does not serve it.
    """
    return call("dwconv3d", x, weight, bias, checks.one("stride", stride), backend)


def depthwise_conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    output_padding: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Depthwise transposed convolution of volumes with stride 2, with which MedNeXt doubles them.

    x (N, C, D, H, W); weight (C, 1, KD, KH, KW), each side odd and up to 7; bias (C,) or None. K // 2 pixels are cut
    off each side, as by ``torch.nn.ConvTranspose3d(..., stride=2, padding=K // 2)``: each size becomes 2 size - 1 +
    output_padding, which is 0 or 1. The backend "cuda" does not serve it.
    """
    return call("dwconv3d_transposed", x, weight, bias, checks.one("output_padding", output_padding), backend)


def layer_norm2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    backend: str = "auto",
) -> Tensor:
    """LayerNorm of every pixel over its channels: x (N, C, H, W); weight and bias (C,); statistics in fp32.

    `norm` in place of LayerNorm, "rms" or "simple", as in `inverted_bottleneck`: bias is None then.
    """
    return call("layernorm", x, weight, bias, eps, norm, backend)


def global_response_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """Global response normalisation (arXiv 2301.00808, equations 1-3) of x (N, C, H, W).

    ``weight * (x * Nx) + bias + x`` with ``G = ||x||_2`` over (H, W) and ``Nx = G / (mean_C G + eps)``;
    weight and bias have C elements in any shape. For an NHWC tensor pass ``x.permute(0, 3, 1, 2)``.
    """
    return call("grn", x, weight, bias, eps, backend)


def inverted_bottleneck(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor | None,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor | None,
    *,
    gamma: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    drop_scale: Tensor | None = None,
    eps: float = 1e-6,
    grn_eps: float = 1e-6,
    norm: str = "layer",
    activation: str = "gelu",
    memory: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Return ``residual + drop_scale * gamma * (GRN(act(norm(x) W1^T + b1)) W2^T + b2)`` (arXiv 2201.03545, fig. 4).

    x and residual (N, C, H, W); norm_weight, norm_bias, gamma, pwconv2_bias (C,); pwconv1_weight (hidden, C)
    and pwconv2_weight (C, hidden), or the same as 1x1 convolutions; pwconv1_bias, grn_weight and grn_bias
    (hidden,); drop_scale (N,): 0 for a dropped sample, 1 / keep probability for a kept one. Where no gradient is
    computed, LayerNorm's weight and bias may also be (N, C): those of each sample.

    `norm` in place of LayerNorm: "rms" is x / sqrt(mean(x^2) + eps) * weight, "simple" timm's SimpleNorm, x / sqrt(var
    + eps) * weight with the variance over C - 1; both have no bias (norm_bias is None). `activation` in place of the
    exact GELU ("gelu", erf): "gelu_tanh", "quick_gelu", "silu", "mish", "relu", "relu6" or "hardswish".

    `memory` says what the forward pass keeps for the gradient beside its inputs: "min" keeps nothing, "balanced" the
    hidden before the activation (hidden / C times the size of x), "auto" chooses one of the two. A backend that always
    computes the hidden again (eager) keeps nothing.
    """
    tensors = (
        x,
        residual,
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        pwconv2_weight,
        pwconv2_bias,
        gamma,
        grn_weight,
        grn_bias,
        drop_scale,
    )
    return call("mlp", *tensors, eps, grn_eps, norm, activation, None, _memory(memory, tensors), backend)[0]


def convnext_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor | None,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor | None,
    *,
    gamma: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    drop_scale: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    eps: float = 1e-6,
    grn_eps: float = 1e-6,
    norm: str = "layer",
    activation: str = "gelu",
    memory: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The ConvNeXt block, V1 (with gamma) or V2 (with GRN): x + `inverted_bottleneck`(`depthwise_conv2d`(x)).

    Shapes and `memory` are those of these two functions. Here "min" keeps the convolution's result (2 times the
    size of x with x itself) and "balanced" the hidden as well (6 times). Eager PyTorch keeps 12 times the size of x.
    Under autocast an fp32 x and the convolution's result are kept in the dtype of the matmuls on a GPU.
    """
    tensors = (
        x,
        dwconv_weight,
        dwconv_bias,
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        pwconv2_weight,
        pwconv2_bias,
        gamma,
        grn_weight,
        grn_bias,
        drop_scale,
    )
    return block_of(tensors, dilation, eps, grn_eps, norm, activation, memory, backend)


def adaptive_convnext_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *pointwise: Tensor | None,
    gamma: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    drop_scale: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    eps: float = 1e-6,
    **options: Any,
) -> Tensor:
    """`convnext_block` with AdaLayerNorm: `scale` and `shift` (N, C) are each sample's weight and bias of LayerNorm.

    `pointwise` are pwconv1_weight, pwconv1_bias, pwconv2_weight and pwconv2_bias; `options` the others of
    `convnext_block`, but `norm`. With one scale and shift for all samples, (C,) or (1, C), and where no gradient is
    computed, it is that function: one op. Training with those of each sample is `depthwise_conv2d`, `layer_norm2d`, a
    multiplication by PyTorch and `inverted_bottleneck`: 18C bytes per pixel in 16 bits and not 10C.
    """
    checks.image("x", x)
    checks.per_sample("scale", scale, x)
    checks.per_sample("shift", shift, x)
    # not |=: torch.compile of PyTorch 2.6 does not trace it
    options.update(gamma=gamma, grn_weight=grn_weight, grn_bias=grn_bias, drop_scale=drop_scale)
    tensors = (x, dwconv_weight, dwconv_bias, scale, shift, *pointwise)
    if scale.numel() == shift.numel() == x.shape[1]:
        return convnext_block(*tensors, dilation=dilation, eps=eps, **options)
    if not _differentiated((*tensors, gamma, grn_weight, grn_bias)):
        if scale.shape != shift.shape:
            scale, shift = (t.reshape(-1, x.shape[1]).expand(x.shape[:2]) for t in (scale, shift))
        return convnext_block(*tensors[:3], scale, shift, *pointwise, dilation=dilation, eps=eps, **options)
    backend = options.get("backend", "auto")
    y = depthwise_conv2d(x, dwconv_weight, dwconv_bias, dilation=dilation, backend=backend)
    y = layer_norm2d(y, constant(y, 1.0), constant(y, 0.0), eps=eps, backend=backend).permute(0, 2, 3, 1)
    y = torch.addcmul(_rows(shift), y, _rows(scale)).permute(0, 3, 1, 2).to(x.dtype)
    weight, eps = identity_norm(y)
    return inverted_bottleneck(y, weight, None, *pointwise, residual=x, eps=eps, norm="rms", **options)


def _rows(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, t.shape[-1])


def block_of(
    tensors: tuple[Tensor | None, ...],
    dilation: int | tuple[int, int],
    eps: float,
    grn_eps: float,
    norm: str,
    activation: str,
    memory: str,
    backend: str,
) -> Tensor:
    """`convnext_block` with its 13 tensors in the order of its arguments; for modules, which keep them in a tuple."""
    down, right = checks.pair("dilation", dilation)
    memory = _memory(memory, tensors)
    return call("block", *tensors, down, right, eps, grn_eps, norm, activation, None, memory, backend)[0]


def patch_downsample(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    backend: str = "auto",
) -> Tensor:
    """ConvNeXt's downsampling layer: `layer_norm2d`, then a KxK convolution with stride K (section 2.6).

    x (N, C, H, W); weight (D, C, K, K); bias (D,) or None; the result is (N, D, H // K, W // K). `norm` as in
    `layer_norm2d`.
    """
    return call("downsample", x, norm_weight, norm_bias, weight, bias, eps, norm, None, backend)
