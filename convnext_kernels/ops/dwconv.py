"""``convnext_kernels::dwconv``: depthwise convolution, odd kernel, zero padding that keeps the size, stride 1 or 2."""

from typing import Any

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import DwconvCall, Inputs, convolved
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import convolution
from convnext_kernels.ops.depthwise import register
from convnext_kernels.ops.registration import gradients_like, served
from convnext_kernels.spec import OpSpec


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation_h: int, dilation_w: int, stride: int, backend: str
) -> None:
    checks.image("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.channels(x, ("weight", weight, 0), ("bias", bias, None))
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


# Integers and not lists of them, which would have to be hashed and compared at every call.
register("dwconv", "int dilation_h, int dilation_w, int stride", _forward, _fake, _backward, _composed)
