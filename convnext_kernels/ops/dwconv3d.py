"""``convnext_kernels::dwconv3d``: depthwise convolution of volumes, odd kernel, zero padding, stride 1 or 2."""

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import Dwconv3dCall, Inputs, convolved
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import convolution
from convnext_kernels.ops.depthwise import register
from convnext_kernels.ops.registration import gradients_like, served
from convnext_kernels.spec import OpSpec


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, backend: str) -> None:
    checks.volume("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.channels(x, ("weight", weight, 0), ("bias", bias, None))
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


register("dwconv3d", "int stride", _forward, _fake, _backward, _composed)
