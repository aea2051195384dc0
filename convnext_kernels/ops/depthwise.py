"""How the depthwise convolutions are registered: `dwconv` of images, `dwconv3d`, `dwconv3d_transposed` of volumes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.ops.registration import (
    autocast,
    call,
    cast_tensors,
    composed,
    define,
    differentiable,
    gradients_like,
    scatter,
)

_TENSORS = "Tensor x, Tensor weight, Tensor? bias"


def register(
    op: str, options: str, forward: Callable, fake: Callable, backward: Callable, composition: Callable
) -> None:
    """Register `op`, (x, weight, bias, *options, backend) -> y, its gradient, autocast and its composition.

    Its backward op is (dy, x, weight, bias, *options, needs, backend) -> the gradients of x, weight and bias that
    `needs` marks.
    """

    def backward_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> list[Tensor]:
        return gradients_like([x, weight, bias], given[-2])

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:-1]
        ctx.backend = dispatch.requested_backend(inputs[-1])

    def gradient(ctx: Any, dy: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[:3])
        gradients = call(f"{op}_backward", dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
        return (*scatter(gradients, needs), *(None for _ in ctx.options), None)

    define(op, f"{_TENSORS}, {options}, str backend", "Tensor", forward, fake)
    arguments = f"Tensor dy, {_TENSORS}, {options}, bool[] needs, str backend"
    define(f"{op}_backward", arguments, "Tensor[]", backward, backward_fake)
    differentiable(op, setup_context, gradient)
    autocast(op, lambda dtype, *arguments: cast_tensors(dtype, arguments))
    composed(op, composition)
