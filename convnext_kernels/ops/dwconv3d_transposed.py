"""``convnext_kernels::dwconv3d_transposed``: depthwise transposed convolution of volumes with stride 2.

It is the input gradient of `dwconv3d` with stride 2, and its own gradients are that op's forward pass and weight
gradient. So it has no files in `backends/`: those of `dwconv3d` are called the other way round.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels import dispatch, torch_versions
from convnext_kernels.calls import Dwconv3dCall, Inputs
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import cast
from convnext_kernels.ops.depthwise import register
from convnext_kernels.ops.registration import gradients_like, served
from convnext_kernels.spec import OpSpec

_STRIDE = 2


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str) -> None:
    checks.volume("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.depthwise_weight("weight", weight, x.shape[1], "KD, KH, KW")
    checks.vector("bias", bias, x.shape[1], "one per channel of x")
    if output_padding not in (0, 1):
        raise ValueError(f"output_padding: expected 0 or 1, got {output_padding}")


def _spec(x: Tensor, weight: Tensor, backward: bool) -> OpSpec:
    kernel = tuple(weight.shape[2:])
    return OpSpec("dwconv3d", x.device.type, x.dtype, x.dtype, x.shape[1], kernel, (1, 1), _STRIDE, backward=backward)


def _larger(x: Tensor, output_padding: int) -> Tensor:
    """An empty tensor for the result: the volume whose convolution has x's size."""
    n, c, *sizes = x.shape
    shape = (n, c, *(_STRIDE * size - 1 + output_padding for size in sizes))
    memory_format = torch_versions.suggest_memory_format(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _forward(
    inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str
) -> Tensor:
    def find() -> tuple:
        _check(x, weight, bias, output_padding, backend)
        return (dispatch.choose(_spec(x, weight, backward=True), backend, x),)

    (kernel,) = served(inputs, backend, find)
    like = _larger(x, output_padding)
    if x.numel() == 0:
        return like
    (y,) = kernel.backward(x, Dwconv3dCall(like, weight, None, _STRIDE, x.dtype), [True, False, False])
    return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str) -> Tensor:
    _check(x, weight, bias, output_padding, backend)
    return _larger(x, output_padding)


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str) -> Tensor:
    _check(x, weight, bias, output_padding, backend)
    channels, _, *sides = map(int, weight.shape)
    weight, bias = cast(weight, x.dtype), cast(bias, x.dtype)
    return F.conv_transpose3d(x, weight, bias, _STRIDE, [side // 2 for side in sides], output_padding, channels)


def _backward(
    inputs: Inputs,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: int,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    def find() -> tuple:
        checks.gradient("dy", dy, _larger(x.to("meta"), output_padding))
        checks.same_device("dy", dy, x)
        return tuple(dispatch.choose(_spec(x, weight, backward), backend, x) for backward in (False, True))

    forward, backward = served(inputs, backend, find)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
    call = Dwconv3dCall(dy, weight, None, _STRIDE, x.dtype)
    gradients = []
    if needs[0]:
        dx = forward.forward(call)
        gradients.append(dx if dx.stride() == torch.empty_like(x).stride() else torch.empty_like(x).copy_(dx))
    if needs[1]:
        gradients += backward.backward(x, call, [False, True, False])
    if needs[2]:
        wide = torch.float32 if dy.dtype.itemsize == 2 else dy.dtype
        gradients.append(torch.empty_like(bias).copy_(dy.sum((0, 2, 3, 4), dtype=wide).view(bias.shape)))
    return gradients


register("dwconv3d_transposed", "int output_padding", _forward, _fake, _backward, _composed)
