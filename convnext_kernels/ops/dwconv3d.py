"""``convnext_kernels::dwconv3d``: depthwise convolution of volumes, odd kernel, zero padding, stride 1 or 2."""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import Dwconv3dCall, Inputs, convolved
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import convolution
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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, backend: str) -> None:
    checks.volume("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.depthwise_weight("weight", weight, x.shape[1], "KD, KH, KW")
    checks.vector("bias", bias, x.shape[1], "one per channel of x")
    checks.stride(stride)


def _spec(x: Tensor, weight: Tensor, stride: int, backward: bool = False) -> OpSpec:
    kernel = tuple(weight.shape[2:])
    return OpSpec("dwconv3d", x.device.type, x.dtype, x.dtype, x.shape[1], kernel, (1, 1), stride, backward=backward)


def _forward(inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, backend: str) -> Tensor:
    def find() -> tuple:
        _check(x, weight, bias, stride, backend)
        return (dispatch.choose(_spec(x, weight, stride), backend, x),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return convolved(x, stride)
    return kernel.forward(Dwconv3dCall(x, weight, bias, stride, x.dtype, inputs))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, backend: str) -> Tensor:
    _check(x, weight, bias, stride, backend)
    return convolved(x, stride)


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, backend: str) -> Tensor:
    _check(x, weight, bias, stride, backend)
    return convolution(x, weight, bias, (1, 1, 1), x.dtype, stride)


def _backward(
    inputs: Inputs,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    def find() -> tuple:
        checks.gradient("dy", dy, convolved(x.to("meta"), stride))
        checks.same_device("dy", dy, x)
        return (dispatch.choose(_spec(x, weight, stride, backward=True), backend, x, needs),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
    return kernel.backward(dy, Dwconv3dCall(x, weight, bias, stride, x.dtype, inputs), needs)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, needs: list[bool], backend: str
) -> list[Tensor]:
    return gradients_like([x, weight, bias], needs)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.stride = inputs[3]
    ctx.backend = dispatch.requested_backend(inputs[4])


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    gradients = call("dwconv3d_backward", dy, *ctx.saved_tensors, ctx.stride, needs, ctx.backend)
    return (*scatter(gradients, needs), None, None)


_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
define("dwconv3d", f"{_TENSORS}, int stride, str backend", "Tensor", _forward, _fake)
define(
    "dwconv3d_backward",
    f"Tensor dy, {_TENSORS}, int stride, bool[] needs, str backend",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("dwconv3d", _setup_context, _autograd)
autocast("dwconv3d", lambda dtype, *arguments: cast_tensors(dtype, arguments))
composed("dwconv3d", _composed)
