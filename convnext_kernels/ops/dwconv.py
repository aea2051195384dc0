"""``convnext_kernels::dwconv``: depthwise convolution, odd square kernel, stride 1, "same" padding."""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import DwconvCall, Inputs
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import convolved
from convnext_kernels.ops.registration import (
    autocast,
    call,
    cast_tensors,
    composed,
    define,
    differentiable,
    gradients_like,
    scatter,
    served,
)
from convnext_kernels.spec import OpSpec


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    checks.image("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.depthwise_weight("weight", weight, x.shape[1])
    checks.vector("bias", bias, x.shape[1], "one per channel of x")
    checks.dilation(dilation)


def _spec(x: Tensor, weight: Tensor, dilation: int, backward: bool = False) -> OpSpec:
    return OpSpec("dwconv", x.device.type, x.dtype, x.dtype, x.shape[1], weight.shape[-1], dilation, backward=backward)


def _forward(inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
    def find() -> tuple:
        _check(x, weight, bias, dilation)
        return (dispatch.choose(_spec(x, weight, dilation), backend, x),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return torch.empty_like(x)
    return kernel.forward(DwconvCall(x, weight, bias, dilation, x.dtype, inputs))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
    _check(x, weight, bias, dilation)
    return torch.empty_like(x)


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, backend: str) -> Tensor:
    _check(x, weight, bias, dilation)
    return convolved(x, weight, bias, dilation, x.dtype)


def _backward(
    inputs: Inputs,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    def find() -> tuple:
        checks.gradient("dy", dy, x)
        checks.same_device("dy", dy, x)
        return (dispatch.choose(_spec(x, weight, dilation, backward=True), backend, x, needs),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
    return kernel.backward(dy, DwconvCall(x, weight, bias, dilation, x.dtype, inputs), needs)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, needs: list[bool], backend: str
) -> list[Tensor]:
    return gradients_like([x, weight, bias], needs)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.dilation, backend = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.backend = dispatch.requested_backend(backend)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    gradients = call("dwconv_backward", dy, *ctx.saved_tensors, ctx.dilation, needs, ctx.backend)
    return (*scatter(gradients, needs), None, None)


_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
define("dwconv", f"{_TENSORS}, int dilation, str backend", "Tensor", _forward, _fake)
define(
    "dwconv_backward",
    f"Tensor dy, {_TENSORS}, int dilation, bool[] needs, str backend",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("dwconv", _setup_context, _autograd)
autocast("dwconv", lambda dtype, *arguments: cast_tensors(dtype, arguments))
composed("dwconv", _composed)
