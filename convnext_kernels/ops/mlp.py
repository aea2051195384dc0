"""``convnext_kernels::mlp``: norm -> Linear -> activation -> [GRN] -> Linear -> gamma -> drop path -> + residual."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import Inputs, MlpCall
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import cast, matrix, nchw, nhwc, normalised, response_normalised, vector
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
from convnext_kernels.spec import MlpParameters, OpSpec
from convnext_kernels.variants import ACTIVATIONS, LAYER, NORMS

PARAMETERS = (
    "Tensor norm_weight, Tensor? norm_bias, Tensor pwconv1_weight, Tensor? pwconv1_bias, Tensor pwconv2_weight, "
    "Tensor? pwconv2_bias, Tensor? gamma, Tensor? grn_weight, Tensor? grn_bias"
)
_VARIANT = "float eps, float grn_eps, str norm, str activation, ScalarType? compute_dtype"
OPTIONS = f"{_VARIANT}, str memory, str backend"
BACKWARD_OPTIONS = f"{_VARIANT}, Tensor[] saved, bool[] needs, str backend"
_TENSORS = f"Tensor x, Tensor? residual, {PARAMETERS}, Tensor? drop_scale"


def channels_of(p: MlpParameters) -> tuple:
    """The parameters that have x's number of channels, for `checks.channels`."""
    norm = ("norm_weight", p.norm_weight, 1 if p.norm_weight.dim() == 2 else None)
    return norm, ("pwconv1_weight", p.pwconv1_weight, 1), ("pwconv2_weight", p.pwconv2_weight, 0)


def check_mlp(
    x: Tensor,
    p: MlpParameters,
    drop_scale: Tensor | None,
    eps: float,
    grn_eps: float,
    norm: str,
    activation: str,
    mixed_dtypes: bool,
) -> None:
    """Check everything that `mlp` and `block` have in common; x is (N, C, H, W)."""
    n, channels = x.shape[:2]
    checks.choice("norm", norm, NORMS)
    checks.choice("activation", activation, ACTIVATIONS)
    named = (*zip(MlpParameters._fields, p, strict=True), ("drop_scale", drop_scale))
    checks.parameters(x, named, mixed_dtypes)
    checks.channels(x, *channels_of(p))
    per_channel = "one per channel of x"
    # A vector's length is not compared with n, which may be dynamic: the comparison would become a guard.
    matrix = norm == LAYER and p.norm_bias is not None and p.norm_weight.dim() == 2
    if not matrix or p.norm_weight.shape != (n, channels):
        checks.vector("norm_weight", p.norm_weight, channels, per_channel)
        checks.norm_bias("norm_bias", p.norm_bias, channels, norm)
    else:
        checks.same_shape("norm_bias", p.norm_bias, p.norm_weight, "norm_weight")
    checks.pointwise_weight("pwconv1_weight", p.pwconv1_weight, None, channels, "x's number of channels")
    hidden = p.pwconv1_weight.shape[0]
    per_hidden = "one per row of pwconv1_weight"
    checks.vector("pwconv1_bias", p.pwconv1_bias, hidden, per_hidden)
    checks.pointwise_weight("pwconv2_weight", p.pwconv2_weight, channels, hidden, "the rows of pwconv1_weight")
    checks.vector("pwconv2_bias", p.pwconv2_bias, channels, per_channel)
    checks.vector("gamma", p.gamma, channels, per_channel)
    if (p.grn_weight is None) != (p.grn_bias is None):
        raise ValueError("grn_weight, grn_bias: expected both or neither, got one")
    checks.vector("grn_weight", p.grn_weight, hidden, per_hidden)
    checks.vector("grn_bias", p.grn_bias, hidden, per_hidden)
    checks.vector("drop_scale", drop_scale, n, "one per sample of x")
    checks.epsilon("eps", eps)
    checks.epsilon("grn_eps", grn_eps)


def check_memory(memory: str, p: MlpParameters) -> None:
    """Check what a forward pass of `mlp` or `block` keeps for its gradient, which an adaptive norm does not have."""
    checks.memory(memory)
    if memory != "nothing" and p.adaptive:
        shape = tuple(p.norm_weight.shape)
        raise ValueError(f"norm_weight: expected {shape[1]} elements where a gradient is computed, got shape {shape}")


def promote(dtype: torch.dtype, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, torch.dtype | None]:
    """Under autocast: x in the dtype that eager's residual sum would have, and the dtype of the matmuls.

    Eager multiplies the bf16 branch by the fp32 gamma, so its sum is fp32 even if x is bf16.
    """
    if x.dtype == torch.float64:
        return x, None
    return (x if gamma is None else x.to(torch.promote_types(x.dtype, gamma.dtype))), dtype


def _check(
    x: Tensor,
    residual: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    options: tuple,
    mixed_dtypes: bool,
) -> None:
    checks.image("x", x)
    if residual is not None:
        checks.parameters(x, (("residual", residual),))
        checks.same_shape("residual", residual, x)
    check_mlp(x, p, drop_scale, *options, mixed_dtypes)


def hidden_like(x: Tensor, p: MlpParameters, compute_dtype: torch.dtype | None) -> Tensor:
    """An empty tensor for what ``memory="balanced"`` keeps: u, channels_last (N, hidden, H, W)."""
    shape = (x.shape[0], p.pwconv1_weight.shape[0], *x.shape[2:])
    dtype = compute_dtype or x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def matrices_like(p: MlpParameters, dtype: torch.dtype) -> list[Tensor]:
    """Empty (out, in) matrices for both pointwise weights, in `dtype`."""
    return [
        torch.empty(weight.shape[:2], dtype=dtype, device=weight.device)
        for weight in (p.pwconv1_weight, p.pwconv2_weight)
    ]


def _saved(keeps: str, x: Tensor, p: MlpParameters, compute_dtype: torch.dtype) -> list[Tensor]:
    """Empty tensors for what `mlp` keeps for its gradient beside its inputs."""
    return [hidden_like(x, p, compute_dtype)] if keeps == "balanced" else []


def _spec(
    x: Tensor, p: MlpParameters, variant: Sequence[str], compute_dtype: torch.dtype | None, backward: bool = False
) -> OpSpec:
    return OpSpec(
        "mlp",
        x.device.type,
        x.dtype,
        compute_dtype or x.dtype,
        x.shape[1],
        hidden=p.pwconv1_weight.shape[0],
        grn=p.grn_weight is not None,
        backward=backward,
        norm=variant[0],
        activation=variant[1],
    )


def _forward(inputs: Inputs, x: Tensor, residual: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, *options, compute_dtype, memory, backend) = MlpParameters(*rest[:9]), rest[9:]

    def find() -> tuple:
        _check(x, residual, p, drop_scale, options, compute_dtype is not None)
        check_memory(memory, p)
        spec = _spec(x, p, options[2:], compute_dtype)
        keeps = dispatch.keeps(spec, memory, backend)
        return dispatch.choose(spec, backend, x, keeps), keeps, spec.compute_dtype

    kernel, keeps, compute_dtype = served(inputs, backend, find)
    saved = _saved(keeps, x, p, compute_dtype)
    if x.numel() == 0:
        return [torch.empty_like(x), *saved]
    call = MlpCall(x, residual, p, drop_scale, *options, compute_dtype, inputs)
    return [kernel.forward(call, *saved), *saved]


def _fake(x: Tensor, residual: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, *options, compute_dtype, memory, backend) = MlpParameters(*rest[:9]), rest[9:]
    _check(x, residual, p, drop_scale, options, compute_dtype is not None)
    check_memory(memory, p)
    spec = _spec(x, p, options[2:], compute_dtype)
    return [torch.empty_like(x), *_saved(dispatch.keeps(spec, memory, backend), x, p, spec.compute_dtype)]


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    eps: float,
    grn_eps: float,
    norm: str,
    activation: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The inverted bottleneck of x (N, C, H, W), composed of PyTorch's operators: products in `compute_dtype`."""
    n = cast(normalised(nhwc(x), p.norm_weight, p.norm_bias, eps, norm), compute_dtype)
    u = F.linear(n, matrix(p.pwconv1_weight, compute_dtype), vector(p.pwconv1_bias, compute_dtype))
    h = ACTIVATIONS[activation].forward(u)
    if p.grn_weight is not None:
        h = response_normalised(h, p.grn_weight, p.grn_bias, grn_eps)
    z = cast(F.linear(h, matrix(p.pwconv2_weight, compute_dtype), vector(p.pwconv2_bias, compute_dtype)), x.dtype)
    if p.gamma is not None:
        z = z * vector(p.gamma, x.dtype)
    if drop_scale is not None:
        z = z * cast(drop_scale.reshape(-1, 1, 1, 1), x.dtype)
    return nchw(z) if residual is None else residual + nchw(z)


def _composed(x: Tensor, residual: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, *options, compute_dtype, memory, _) = MlpParameters(*rest[:9]), rest[9:]
    _check(x, residual, p, drop_scale, options, compute_dtype is not None)
    check_memory(memory, p)
    return [bottleneck(x, residual, p, drop_scale, *options, compute_dtype or x.dtype)]


def _backward(inputs: Inputs, dout: Tensor, x: Tensor, residual: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, *options, compute_dtype, saved, needs, backend) = MlpParameters(*rest[:9]), rest[9:]

    def find() -> tuple:
        check_memory("min", p)
        checks.gradient("dout", dout, x)
        checks.same_device("dout", dout, x)
        checks.saved(saved, [hidden_like(x.to("meta"), p, compute_dtype)])
        spec = _spec(x, p, options[2:], compute_dtype, backward=True)
        return dispatch.choose(spec, backend, x, len(saved), needs), spec.compute_dtype

    kernel, compute_dtype = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, residual, *p], needs)]
    call = MlpCall(x, residual, p, drop_scale, *options, compute_dtype, inputs)
    return kernel.backward(dout, call, needs, *saved)


def _backward_fake(dout: Tensor, x: Tensor, residual: Tensor | None, *rest: Any) -> list[Tensor]:
    return gradients_like([x, residual, *rest[:9]], rest[16])


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[12:17]
    ctx.backend = dispatch.requested_backend(inputs[18])


def _autograd(ctx: Any, gradients: list[Tensor | None]) -> tuple:
    if gradients[0] is None:
        return (None,) * 19
    needs = list(ctx.needs_input_grad[:11])
    kept = ctx.saved_tensors  # read once: activation checkpointing unpacks a tensor only once
    tensors, saved = kept[:12], list(kept[12:])
    gradients = call("mlp_backward", gradients[0], *tensors, *ctx.options, saved, needs, ctx.backend)
    return (*scatter(gradients, needs), *[None] * 8)


def _autocast(dtype: torch.dtype, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple:
    x, compute_dtype = promote(dtype, x, rest[6])
    if residual is not None:
        x, residual = (t.to(torch.promote_types(x.dtype, residual.dtype)) for t in (x, residual))
    return (x, residual, *rest[:14], compute_dtype, *rest[15:])


define("mlp", f"{_TENSORS}, {OPTIONS}", "Tensor[]", _forward, _fake)
define(
    "mlp_backward",
    f"Tensor dout, {_TENSORS}, {BACKWARD_OPTIONS}",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("mlp", _setup_context, _autograd)
autocast("mlp", _autocast)
composed("mlp", _composed)
