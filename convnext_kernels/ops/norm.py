"""What `layernorm` and `grn` share: both map (x, weight, bias, eps) to a tensor like x. `layernorm` has `norm` too."""

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
from convnext_kernels.variants import LAYER, NORMS


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str = LAYER) -> None:
    checks.image("x", x)
    checks.choice("norm", norm, NORMS)
    checks.parameters(x, (("weight", weight), ("bias", bias)))
    checks.channels(x, ("weight", weight, None), ("bias", bias, None))
    checks.vector("weight", weight, x.shape[1], "one per channel of x")
    checks.norm_bias("bias", bias, x.shape[1], norm)
    checks.epsilon("eps", eps)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    _check(x, weight, bias, *options[:-1])
    return torch.empty_like(x)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> list[Tensor]:
    return gradients_like([x, weight, bias], options[-2])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.options, backend = *inputs[:3], inputs[3:-1], inputs[-1]
    ctx.save_for_backward(*tensors)
    ctx.backend = dispatch.requested_backend(backend)


def define_norm(op: str, composition: Callable[..., Tensor], norms: bool = False) -> None:
    """Register ``convnext_kernels::<op>`` and its gradient; `composition` computes it with PyTorch on (N, H, W, C).

    With `norms` it has the option `norm`, and the bias may be None.
    """

    def compose(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        _check(x, weight, bias, *options[:-1])
        return nchw(composition(nhwc(x), weight, bias, *options[:-1]))

    def spec(x: Tensor, norm: str = LAYER, backward: bool = False) -> OpSpec:
        return OpSpec(op, x.device.type, x.dtype, x.dtype, x.shape[1], backward=backward, norm=norm)

    def forward(inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *rest: Any) -> Tensor:
        *norm, backend = rest

        def find() -> tuple:
            _check(x, weight, bias, eps, *norm)
            return (dispatch.choose(spec(x, *norm), backend, x),)

        (kernel,) = served(inputs, backend, find)
        if x.numel() == 0:
            return torch.empty_like(x)
        return kernel.forward(NormCall(x, weight, bias, eps, *(norm or (LAYER,)), inputs))

    def backward(
        inputs: Inputs, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *rest: Any
    ) -> list[Tensor]:
        *norm, needs, backend = rest

        def find() -> tuple:
            checks.gradient("dy", dy, x)
            checks.same_device("dy", dy, x)
            return (dispatch.choose(spec(x, *norm, backward=True), backend, x, needs),)

        (kernel,) = served(inputs, backend, find)
        if x.numel() == 0:
            return [torch.zeros_like(t) for t in gradients_like([x, weight, bias], needs)]
        return kernel.backward(dy, NormCall(x, weight, bias, eps, *(norm or (LAYER,)), inputs), needs)

    def autograd(ctx: Any, dy: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[:3])
        gradients = call(f"{op}_backward", dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
        return (*scatter(gradients, needs), *[None] * (len(ctx.options) + 1))

    tensors = f"Tensor x, Tensor weight, Tensor{'?' if norms else ''} bias"
    options = "float eps, str norm" if norms else "float eps"
    define(op, f"{tensors}, {options}, str backend", "Tensor", forward, _fake)
    define(
        f"{op}_backward",
        f"Tensor dy, {tensors}, {options}, bool[] needs, str backend",
        "Tensor[]",
        backward,
        _backward_fake,
    )
    differentiable(op, _setup_context, autograd)
    # Like torch.nn.functional.layer_norm on CUDA: norms run in fp32 under autocast, fp32 in and fp32 out.
    autocast(op, lambda dtype, *arguments: cast_tensors(torch.float32, arguments))
    composed(op, compose)
