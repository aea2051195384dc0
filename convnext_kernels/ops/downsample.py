"""``convnext_kernels::downsample``: a norm over the channels, then a KxK convolution with stride K."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import DownsampleCall, Inputs, downsampled
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import cast, nchw, nhwc, normalised
from convnext_kernels.ops.registration import (
    autocast,
    call,
    composed,
    define,
    differentiable,
    gradients_like,
    scatter,
    served,
)
from convnext_kernels.spec import OpSpec
from convnext_kernels.variants import NORMS

_TENSORS = "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias"


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    mixed_dtypes: bool,
) -> None:
    checks.image("x", x)
    checks.choice("norm", norm, NORMS)
    channels = x.shape[1]
    named = (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("weight", weight), ("bias", bias))
    checks.parameters(x, named, mixed_dtypes)
    checks.channels(x, ("norm_weight", norm_weight, None), ("norm_bias", norm_bias, None), ("weight", weight, 1))
    checks.vector("norm_weight", norm_weight, channels, "one per channel of x")
    checks.norm_bias("norm_bias", norm_bias, channels, norm)
    checks.patch_weight("weight", weight, x)
    checks.vector("bias", bias, weight.shape[0], "one per row of weight")
    checks.epsilon("eps", eps)


def _spec(x: Tensor, norm: str, compute_dtype: torch.dtype | None, weight: Tensor, backward: bool = False) -> OpSpec:
    return OpSpec(
        "downsample",
        x.device.type,
        x.dtype,
        compute_dtype or x.dtype,
        x.shape[1],
        (weight.shape[2], weight.shape[3]),
        hidden=weight.shape[0],
        backward=backward,
        norm=norm,
    )


def _forward(
    inputs: Inputs,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    def find() -> tuple:
        _check(x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype is not None)
        return (dispatch.choose(_spec(x, norm, compute_dtype, weight), backend, x),)

    (kernel,) = served(inputs, backend, find)
    call = DownsampleCall(x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype or x.dtype, inputs)
    return kernel.forward(call) if x.numel() else call.result()


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype is not None)
    return downsampled(x, weight, compute_dtype or x.dtype)


def _composed(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype is not None)
    dtype = compute_dtype or x.dtype
    n = cast(nchw(normalised(nhwc(x), norm_weight, norm_bias, eps, norm)), dtype)
    return F.conv2d(n, cast(weight, dtype), cast(bias, dtype), stride=int(weight.shape[-1]))


def _backward(
    inputs: Inputs,
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    compute_dtype: torch.dtype | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    def find() -> tuple:
        checks.gradient("dy", dy, downsampled(x.to("meta"), weight, compute_dtype or x.dtype))
        checks.same_device("dy", dy, x)
        return (dispatch.choose(_spec(x, norm, compute_dtype, weight, backward=True), backend, x, needs),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, norm_weight, norm_bias, weight, bias], needs)]
    call = DownsampleCall(x, norm_weight, norm_bias, weight, bias, eps, norm, compute_dtype or x.dtype, inputs)
    return kernel.backward(dy, call, needs)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    compute_dtype: torch.dtype | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return gradients_like([x, norm_weight, norm_bias, weight, bias], needs)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:8]
    ctx.backend = dispatch.requested_backend(inputs[8])


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:5])
    gradients = call("downsample_backward", dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*scatter(gradients, needs), None, None, None, None)


def _autocast(dtype: torch.dtype, x: Tensor, *rest: Any) -> tuple:
    return (x, *rest[:6], None if x.dtype == torch.float64 else dtype, rest[7])


_VARIANT = "float eps, str norm, ScalarType? compute_dtype"
define("downsample", f"{_TENSORS}, {_VARIANT}, str backend", "Tensor", _forward, _fake)
define(
    "downsample_backward",
    f"Tensor dy, {_TENSORS}, {_VARIANT}, bool[] needs, str backend",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("downsample", _setup_context, _autograd)
autocast("downsample", _autocast)
composed("downsample", _composed)
