"""``convnext_kernels::block``: the whole ConvNeXt block, x + s * gamma * MLP(LN(dwconv(x)))."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import BlockCall, Inputs
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import cast, convolution
from convnext_kernels.ops.mlp import (
    BACKWARD_OPTIONS,
    OPTIONS,
    PARAMETERS,
    bottleneck,
    channels_of,
    check_memory,
    check_mlp,
    hidden_like,
    matrices_like,
    promote,
)
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

_TENSORS = f"Tensor x, Tensor dwconv_weight, Tensor? dwconv_bias, {PARAMETERS}, Tensor? drop_scale"


def check_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    dilation: tuple[int, int],
    options: tuple,
    mixed_dtypes: bool,
) -> None:
    """Raise TypeError or ValueError, with the argument's name, for what `block` does not take.

    `options`: eps, grn_eps, norm, activation.
    """
    checks.image("x", x)
    checks.parameters(x, (("dwconv_weight", weight), ("dwconv_bias", bias)), mixed_dtypes)
    checks.channels(x, ("dwconv_weight", weight, 0), *channels_of(p))
    checks.depthwise_weight("dwconv_weight", weight, x.shape[1])
    checks.vector("dwconv_bias", bias, x.shape[1], "one per channel of x")
    for step in dilation:
        checks.dilation(step)
    check_mlp(x, p, drop_scale, *options, mixed_dtypes)


def spec_of(
    x: Tensor,
    weight: Tensor,
    p: MlpParameters,
    dilation: tuple[int, int],
    variant: Sequence[str],
    compute_dtype: torch.dtype | None,
    backward: bool = False,
) -> OpSpec:
    """What the choice of a backend depends on. `variant`: norm, activation."""
    return OpSpec(
        "block",
        x.device.type,
        x.dtype,
        compute_dtype or x.dtype,
        x.shape[1],
        (weight.shape[2], weight.shape[3]),
        dilation,
        hidden=p.pwconv1_weight.shape[0],
        grn=p.grn_weight is not None,
        backward=backward,
        norm=variant[0],
        activation=variant[1],
    )


def _saved(keeps: str, rounded: bool, x: Tensor, p: MlpParameters, compute_dtype: torch.dtype) -> list[Tensor]:
    """Empty tensors for what `block` keeps for its gradient beside its inputs: the convolution's y, then the hidden.

    Under autocast a backend may keep all in the dtype of the matmuls (`rounded`): y, then x and both pointwise weights,
    which the gradient takes instead of the inputs, then the hidden.
    """
    if keeps == "nothing":
        return []
    dtype = compute_dtype if rounded else x.dtype
    saved = [torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)]
    if rounded:
        saved += [torch.empty_like(x, dtype=dtype), *matrices_like(p, dtype)]
    return [*saved, hidden_like(x, p, compute_dtype)] if keeps == "balanced" else saved


def _forward(inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, down, right, *options, compute_dtype, memory, backend) = MlpParameters(*rest[:9]), rest[9:]
    dilation = (down, right)

    def find() -> tuple:
        check_block(x, weight, bias, p, drop_scale, dilation, options, compute_dtype is not None)
        check_memory(memory, p)
        spec = spec_of(x, weight, p, dilation, options[2:], compute_dtype)
        keeps = dispatch.keeps(spec, memory, backend)
        rounded = dispatch.rounds(spec, backend)
        return dispatch.choose(spec, backend, x, keeps), keeps, rounded, spec.compute_dtype

    kernel, keeps, rounded, compute_dtype = served(inputs, backend, find)
    saved = _saved(keeps, rounded, x, p, compute_dtype)
    if x.numel() == 0:
        return [torch.empty_like(x), *saved]
    call = BlockCall(x, weight, bias, p, drop_scale, dilation, *options, compute_dtype, inputs)
    return [kernel.forward(call, *saved), *saved]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, down, right, *options, compute_dtype, memory, backend) = MlpParameters(*rest[:9]), rest[9:]
    dilation = (down, right)
    check_block(x, weight, bias, p, drop_scale, dilation, options, compute_dtype is not None)
    check_memory(memory, p)
    spec = spec_of(x, weight, p, dilation, options[2:], compute_dtype)
    keeps, rounded = dispatch.keeps(spec, memory, backend), dispatch.rounds(spec, backend)
    return [torch.empty_like(x), *_saved(keeps, rounded, x, p, spec.compute_dtype)]


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, down, right, *options, compute_dtype, memory, _) = MlpParameters(*rest[:9]), rest[9:]
    dilation = (down, right)
    check_block(x, weight, bias, p, drop_scale, dilation, options, compute_dtype is not None)
    check_memory(memory, p)
    y = cast(convolution(x, weight, bias, dilation, compute_dtype or x.dtype), x.dtype)
    return [bottleneck(y, x, p, drop_scale, *options, compute_dtype or x.dtype)]


def _backward(inputs: Inputs, dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    p, (drop_scale, down, right, *options, compute_dtype, saved, needs, backend) = MlpParameters(*rest[:9]), rest[9:]
    dilation = (down, right)

    def find() -> tuple:
        check_memory("min", p)
        rounded = _rounded(x, compute_dtype, saved)
        like = x.to("meta")
        checks.gradient("dout", dout, like.float() if rounded else like)
        checks.same_device("dout", dout, x)
        checks.saved(
            saved, [like, *(matrices_like(p, x.dtype) if rounded else ()), hidden_like(like, p, compute_dtype)]
        )
        spec = spec_of(x, weight, p, dilation, options[2:], compute_dtype, backward=True)._replace(dtype=dout.dtype)
        return dispatch.choose(spec, backend, x, len(saved), needs), spec.compute_dtype

    kernel, compute_dtype = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in _gradients_like(dout, x, weight, bias, p, needs)]
    call = BlockCall(x, weight, bias, p, drop_scale, dilation, *options, compute_dtype, inputs)
    return kernel.backward(dout, call, needs, *saved)


def _rounded(x: Tensor, compute_dtype: torch.dtype | None, saved: list[Tensor]) -> bool:
    """Whether x and `saved` are what a forward pass kept of an fp32 x in the dtype of the matmuls."""
    return len(saved) > 2 and x.dtype == compute_dtype


def _gradients_like(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, p: Sequence[Tensor | None], needs: list[bool]
) -> list[Tensor]:
    """Empty tensors for the gradients; that of x has the dtype of the result, which x had in the forward pass."""
    of_x = [torch.empty_like(x, dtype=dout.dtype)] if needs[0] else []
    return of_x + gradients_like([weight, bias, *p], needs[1:])


def _backward_fake(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    return _gradients_like(dout, x, weight, bias, rest[:9], rest[18])


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, kept = inputs[0], output[1:]
    if len(kept) > 2:  # x in the dtype of the matmuls
        y, x, *rest = kept
        kept = [y, *rest]
    ctx.save_for_backward(x, *inputs[1:13], *kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[13:20]
    ctx.backend = dispatch.requested_backend(inputs[21])


def _autograd(ctx: Any, gradients: list[Tensor | None]) -> tuple:
    if gradients[0] is None:
        return (None,) * 22
    needs = list(ctx.needs_input_grad[:12])
    kept = ctx.saved_tensors  # read once: activation checkpointing unpacks a tensor only once
    tensors, saved = kept[:13], list(kept[13:])
    gradients = call("block_backward", gradients[0], *tensors, *ctx.options, saved, needs, ctx.backend)
    return (*scatter(gradients, needs), *[None] * 10)


def _autocast(dtype: torch.dtype, x: Tensor, *rest: Any) -> tuple:
    x, compute_dtype = promote(dtype, x, rest[8])
    return (x, *rest[:18], compute_dtype, *rest[19:])


define("block", f"{_TENSORS}, int dilation_h, int dilation_w, {OPTIONS}", "Tensor[]", _forward, _fake)
define(
    "block_backward",
    f"Tensor dout, {_TENSORS}, int dilation_h, int dilation_w, {BACKWARD_OPTIONS}",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("block", _setup_context, _autograd)
autocast("block", _autocast)
composed("block", _composed)
