"""``convnext_kernels::block``: the whole ConvNeXt block, x + s * gamma * MLP(LN(dwconv(x)))."""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels import planner
from convnext_kernels.ops import checks
from convnext_kernels.ops.library import autocast, define, differentiable, gradients_like, scatter
from convnext_kernels.ops.mlp import OPTIONS, PARAMETERS, check_bottleneck, promote
from convnext_kernels.spec import MlpParameters, OpSpec

_TENSORS = f"Tensor x, Tensor dwconv_weight, Tensor? dwconv_bias, {PARAMETERS}, Tensor? drop_scale"


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    dilation: int,
    eps: float,
    grn_eps: float,
    mixed_dtypes: bool,
) -> None:
    checks.image("x", x)
    checks.parameters(x, (("dwconv_weight", weight), ("dwconv_bias", bias)), mixed_dtypes)
    checks.depthwise_weight("dwconv_weight", weight, x.shape[1])
    checks.vector("dwconv_bias", bias, x.shape[1], "one per channel of x")
    checks.dilation(dilation)
    check_bottleneck(x, p, drop_scale, eps, grn_eps, mixed_dtypes)


def _spec(
    x: Tensor,
    weight: Tensor,
    p: MlpParameters,
    dilation: int,
    compute_dtype: torch.dtype | None,
    backward: bool = False,
) -> OpSpec:
    return OpSpec(
        "block",
        x.device.type,
        x.dtype,
        compute_dtype or x.dtype,
        x.shape[1],
        weight.shape[-1],
        dilation,
        hidden=p.pwconv1_weight.shape[0],
        grn=p.grn_weight is not None,
        backward=backward,
    )


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    p, (drop_scale, dilation, eps, grn_eps, compute_dtype, backend) = MlpParameters(*rest[:9]), rest[9:]
    _check(x, weight, bias, p, drop_scale, dilation, eps, grn_eps, compute_dtype is not None)
    kernel = planner.choose(_spec(x, weight, p, dilation, compute_dtype), backend)
    if x.numel() == 0:
        return torch.empty_like(x)
    return kernel.forward(x, weight, bias, p, drop_scale, dilation, eps, grn_eps, compute_dtype or x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    p, (drop_scale, dilation, eps, grn_eps, compute_dtype, _) = MlpParameters(*rest[:9]), rest[9:]
    _check(x, weight, bias, p, drop_scale, dilation, eps, grn_eps, compute_dtype is not None)
    return torch.empty_like(x)


def _backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, dilation, eps, grn_eps, compute_dtype, needs, backend) = MlpParameters(*rest[:9]), rest[9:]
    checks.same_shape("dout", dout, x)
    kernel = planner.choose(_spec(x, weight, p, dilation, compute_dtype, backward=True), backend)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, weight, bias, *p], needs)]
    compute_dtype = compute_dtype or x.dtype
    return kernel.backward(dout, x, weight, bias, p, drop_scale, dilation, eps, grn_eps, compute_dtype, needs)


def _backward_fake(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    return gradients_like([x, weight, bias, *rest[:9]], rest[14])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:13])
    ctx.options = (*inputs[13:17],)
    ctx.backend = planner.requested_backend(inputs[17])


def _autograd(ctx: Any, dout: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:12])
    gradients = torch.ops.convnext_kernels.block_backward(dout, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*scatter(gradients, needs), *[None] * 6)


def _autocast(dtype: torch.dtype, x: Tensor, *rest: Any) -> tuple:
    x, compute_dtype = promote(dtype, x, rest[8])
    return (x, *rest[:15], compute_dtype, rest[16])


define("block", f"{_TENSORS}, int dilation, {OPTIONS}", "Tensor", _forward, _fake)
define(
    "block_backward",
    f"Tensor dout, {_TENSORS}, int dilation, float eps, float grn_eps, ScalarType? compute_dtype, bool[] needs, "
    "str backend",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("block", _setup_context, _autograd)
autocast("block", _autocast)
