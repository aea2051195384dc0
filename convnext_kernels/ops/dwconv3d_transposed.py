"""``convnext_kernels::dwconv3d_transposed``: depthwise transposed convolution of volumes with stride 2.

It is the input gradient of `dwconv3d` with stride 2, and its own gradients are that op's forward pass and weight
gradient. So the backend that serves that op serves it too: `transposed` in its module.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import Dwconv3dTransposedCall, Inputs
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import cast
from convnext_kernels.ops.depthwise import register
from convnext_kernels.ops.registration import gradients_like, served
from convnext_kernels.spec import OpSpec

_STRIDE = 2


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str) -> None:
    checks.volume("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.channels(x, ("weight", weight, 0), ("bias", bias, None))
    checks.depthwise_weight("weight", weight, x.shape[1], "KD, KH, KW")
    checks.vector("bias", bias, x.shape[1], "one per channel of x")
    if output_padding not in (0, 1):
        raise ValueError(f"output_padding: expected 0 or 1, got {output_padding}")


def _served(inputs: Inputs | None, backend: str, x: Tensor, weight: Tensor, check: Callable[[], None]) -> ModuleType:
    """The module that serves the call; `check` runs once for each signature."""

    def find() -> tuple:
        check()
        kernel, c = tuple(weight.shape[2:]), x.shape[1]
        spec = OpSpec("dwconv3d", x.device.type, x.dtype, x.dtype, c, kernel, (1, 1), _STRIDE, backward=True)
        return (dispatch.choose(spec, backend, x).transposed,)

    return served(inputs, backend, find)[0]


def _forward(
    inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str
) -> Tensor:
    kernel = _served(inputs, backend, x, weight, lambda: _check(x, weight, bias, output_padding, backend))
    call = Dwconv3dTransposedCall(x, weight, bias, output_padding, x.dtype, inputs)
    return call.result() if x.numel() == 0 else kernel.forward(call)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: int, backend: str) -> Tensor:
    _check(x, weight, bias, output_padding, backend)
    return Dwconv3dTransposedCall(x, weight, bias, output_padding, x.dtype).result()


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
    call = Dwconv3dTransposedCall(x, weight, bias, output_padding, x.dtype, inputs)

    def check() -> None:
        checks.gradient("dy", dy, call._replace(x=x.to("meta")).result())
        checks.same_device("dy", dy, x)

    kernel = _served(inputs, backend, x, weight, check)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
    return kernel.backward(dy, call, needs)


register("dwconv3d_transposed", "int output_padding", _forward, _fake, _backward, _composed)
