"""``convnext_kernels::dwconv``: depthwise convolution, odd kernel, zero padding that keeps the size, stride 1 or 2."""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import DwconvCall, Inputs, convolved
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


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation_h: int, dilation_w: int, stride: int, backend: str
) -> None:
    checks.image("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.depthwise_weight("weight", weight, x.shape[1])
    checks.vector("bias", bias, x.shape[1], "one per channel of x")
    checks.dilation(dilation_h)
    checks.dilation(dilation_w)
    checks.stride(stride)


def _spec(x: Tensor, weight: Tensor, dilation_h: int, dilation_w: int, stride: int, backward: bool = False) -> OpSpec:
    kernel = (weight.shape[2], weight.shape[3])
    dilation = (dilation_h, dilation_w)
    return OpSpec("dwconv", x.device.type, x.dtype, x.dtype, x.shape[1], kernel, dilation, stride, backward=backward)


def _forward(
    inputs: Inputs,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation_h: int,
    dilation_w: int,
    stride: int,
    backend: str,
) -> Tensor:
    def find() -> tuple:
        _check(x, weight, bias, dilation_h, dilation_w, stride, backend)
        return (dispatch.choose(_spec(x, weight, dilation_h, dilation_w, stride), backend, x),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return convolved(x, stride)
    return kernel.forward(DwconvCall(x, weight, bias, (dilation_h, dilation_w), stride, x.dtype, inputs))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    _check(x, weight, bias, *options)
    return convolved(x, options[2])


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    _check(x, weight, bias, *options)
    dilation_h, dilation_w, stride, _ = options
    return convolution(x, weight, bias, (dilation_h, dilation_w), x.dtype, stride)


def _backward(
    inputs: Inputs,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation_h: int,
    dilation_w: int,
    stride: int,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    def find() -> tuple:
        checks.gradient("dy", dy, convolved(x.to("meta"), stride))
        checks.same_device("dy", dy, x)
        spec = _spec(x, weight, dilation_h, dilation_w, stride, backward=True)
        return (dispatch.choose(spec, backend, x, needs),)

    (kernel,) = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
    convolution = DwconvCall(x, weight, bias, (dilation_h, dilation_w), stride, x.dtype, inputs)
    return kernel.backward(dy, convolution, needs)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> list[Tensor]:
    return gradients_like([x, weight, bias], options[3])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:6]
    ctx.backend = dispatch.requested_backend(inputs[6])


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    gradients = call("dwconv_backward", dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*scatter(gradients, needs), None, None, None, None)


_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
# Integers and not lists of them, which would have to be hashed and compared at every call.
_OPTIONS = "int dilation_h, int dilation_w, int stride"
define("dwconv", f"{_TENSORS}, {_OPTIONS}, str backend", "Tensor", _forward, _fake)
define(
    "dwconv_backward",
    f"Tensor dy, {_TENSORS}, {_OPTIONS}, bool[] needs, str backend",
    "Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("dwconv", _setup_context, _autograd)
autocast("dwconv", lambda dtype, *arguments: cast_tensors(dtype, arguments))
composed("dwconv", _composed)
