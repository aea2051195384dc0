"""What `layernorm` and `grn` share: both map (x, weight, bias, eps) to a tensor like x."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.calls import Inputs, NormCall
from convnext_kernels.ops import checks
from convnext_kernels.ops.compose import nchw, nhwc
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

_TENSORS = "Tensor x, Tensor weight, Tensor bias"


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    checks.image("x", x)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.vector("weight", weight, x.shape[1], "one per channel of x")
    checks.vector("bias", bias, x.shape[1], "one per channel of x")
    checks.epsilon("eps", eps)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    _check(x, weight, bias, eps)
    return torch.empty_like(x)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: list[bool], backend: str
) -> list[Tensor]:
    return gradients_like([x, weight, bias], needs)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, backend = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.backend = dispatch.requested_backend(backend)


def define_norm(op: str, composition: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Register ``convnext_kernels::<op>`` and its gradient; `composition` computes it with PyTorch on (N, H, W, C)."""

    def compose(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
        _check(x, weight, bias, eps)
        return nchw(composition(nhwc(x), weight, bias, eps))

    def spec(x: Tensor, backward: bool = False) -> OpSpec:
        return OpSpec(op, x.device.type, x.dtype, x.dtype, x.shape[1], backward=backward)

    def forward(inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
        def find() -> tuple:
            _check(x, weight, bias, eps)
            return (dispatch.choose(spec(x), backend, x),)

        (kernel,) = served(inputs, backend, find)
        if x.numel() == 0:
            return torch.empty_like(x)
        return kernel.forward(NormCall(x, weight, bias, eps, inputs))

    def backward(
        inputs: Inputs, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: list[bool], backend: str
    ) -> list[Tensor]:
        def find() -> tuple:
            checks.gradient("dy", dy, x)
            checks.same_device("dy", dy, x)
            return (dispatch.choose(spec(x, backward=True), backend, x, needs),)

        (kernel,) = served(inputs, backend, find)
        if x.numel() == 0:
            return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
        return kernel.backward(dy, NormCall(x, weight, bias, eps, inputs), needs)

    def autograd(ctx: Any, dy: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[:3])
        gradients = call(f"{op}_backward", dy, *ctx.saved_tensors, ctx.eps, needs, ctx.backend)
        return (*scatter(gradients, needs), None, None)

    define(op, f"{_TENSORS}, float eps, str backend", "Tensor", forward, _fake)
    define(
        f"{op}_backward",
        f"Tensor dy, {_TENSORS}, float eps, bool[] needs, str backend",
        "Tensor[]",
        backward,
        _backward_fake,
    )
    differentiable(op, _setup_context, autograd)
    # Like torch.nn.functional.layer_norm on CUDA: norms run in fp32 under autocast, fp32 in and fp32 out.
    autocast(op, lambda dtype, *arguments: cast_tensors(torch.float32, arguments))
    composed(op, compose)
