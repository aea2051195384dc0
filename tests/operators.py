"""The ops as data: random arguments for a `Case`, the function under test and its reference."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convnext_kernels import BackendError, functional
from tests import reference
from tests.shapes import VOLUMES, Case
from tests.tolerance import assert_as_good_as_eager, generator, random_vector, random_weight

Arguments = dict[str, Any]


def _bottleneck(case: Case, g: torch.Generator) -> Arguments:
    hidden = case.ratio * case.c
    arguments = {
        "norm_weight": random_vector(case.c, g),
        "norm_bias": random_vector(case.c, g) if case.norm == "layer" else None,
        "pwconv1_weight": random_weight((hidden, case.c), g),
        "pwconv1_bias": random_vector(hidden, g) if case.bias else None,
        "pwconv2_weight": random_weight((case.c, hidden), g),
        "pwconv2_bias": random_vector(case.c, g) if case.bias else None,
    }
    if case.variant == "v1":
        arguments["gamma"] = random_vector(case.c, g)
    if case.variant == "v2":
        arguments |= {"grn_weight": random_vector(hidden, g), "grn_bias": random_vector(hidden, g)}
    if case.drop:
        arguments["drop_scale"] = torch.full((case.n,), 1.25, dtype=torch.double)
        arguments["drop_scale"][0] = 0
    return arguments | {"norm": case.norm, "activation": case.activation}


def _convolution(case: Case, g: torch.Generator, prefix: str = "", axes: int = 2) -> Arguments:
    k = case.k if isinstance(case.k, tuple) else (case.k,) * axes
    return {
        f"{prefix}weight": random_weight((case.c, 1, *k), g),
        f"{prefix}bias": random_vector(case.c, g) if case.bias else None,
    }


def _affine(case: Case, g: torch.Generator) -> Arguments:
    return {"weight": random_vector(case.c, g), "bias": random_vector(case.c, g)}


def _normed(case: Case, g: torch.Generator, prefix: str = "") -> Arguments:
    bias = random_vector(case.c, g) if case.norm == "layer" else None
    return {f"{prefix}weight": random_vector(case.c, g), f"{prefix}bias": bias, "norm": case.norm}


def _mlp(case: Case, g: torch.Generator) -> Arguments:
    residual = torch.randn(case.n, case.c, case.h, case.w, generator=g, dtype=torch.double)
    return _bottleneck(case, g) | {"residual": residual}


def _block(case: Case, g: torch.Generator) -> Arguments:
    return _convolution(case, g, "dwconv_") | _bottleneck(case, g) | {"dilation": case.dilation}


def _dwconv(case: Case, g: torch.Generator) -> Arguments:
    return _convolution(case, g) | {"dilation": case.dilation, "stride": case.stride}


def _dwconv3d(case: Case, g: torch.Generator) -> Arguments:
    return _convolution(case, g, axes=3) | {"stride": case.stride}


def _downsample(case: Case, g: torch.Generator) -> Arguments:
    rows = case.c + 3  # not the number of channels, and no multiple of a vector
    return _normed(case, g, "norm_") | {
        "weight": random_weight((rows, case.c, case.patch, case.patch), g),
        "bias": random_vector(rows, g) if case.bias else None,
    }


@dataclass(frozen=True)
class Operator:
    """One op: how to call it, what it must compute, and arguments for it."""

    name: str
    call: Callable
    reference: Callable
    others: Callable[[Case, torch.Generator], Arguments]

    def __str__(self) -> str:
        return self.name

    def arguments(self, case: Case, dtype: torch.dtype) -> Arguments:
        """Return x and the others, the same ones at every call."""
        g = generator(self.name, str(case), dtype)
        size = (case.d, case.h, case.w) if self.name in VOLUMES else (case.h, case.w)
        x = torch.randn(case.n, case.c, *size, generator=g, dtype=torch.double)
        arguments = {"x": x} | self.others(case, g)
        return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}

    def serve(self, backend: str, **arguments: Any) -> Tensor:
        """Call the op; a backend that says it cannot serve this skips the test, with its words.

        What each backend has promised to serve is asserted in tests/backends.
        """
        try:
            return self.call(**arguments, backend=backend)
        except BackendError as refusal:
            pytest.skip(str(refusal))


OPERATORS = {
    op.name: op
    for op in (
        Operator("dwconv", functional.depthwise_conv2d, reference.depthwise_conv2d, _dwconv),
        Operator("dwconv3d", functional.depthwise_conv3d, reference.depthwise_conv3d, _dwconv3d),
        Operator("layernorm", functional.layer_norm2d, reference.layer_norm2d, _normed),
        Operator("grn", functional.global_response_norm, reference.global_response_norm, _affine),
        Operator("mlp", functional.inverted_bottleneck, reference.inverted_bottleneck, _mlp),
        Operator("block", functional.convnext_block, reference.convnext_block, _block),
        Operator("downsample", functional.patch_downsample, reference.patch_downsample, _downsample),
    )
}


def differentiable(arguments: Arguments) -> list[str]:
    """Names of the arguments that have gradients: drop-path factors are random numbers and have none."""
    return [k for k, v in arguments.items() if isinstance(v, Tensor) and k != "drop_scale"]


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "convnext_kernels":
            self.calls.append((function._schema.name.removeprefix("convnext_kernels::"), args, result))
        return result


def op_calls(function: Callable[[], object]) -> list[tuple[str, tuple, Any]]:
    """Name, arguments and result of every call of this package's ops."""
    calls: list = []
    with _Recorder(calls):
        function()
    return calls


def laid_out(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return `t` in a memory format, itself where it is; channels_last of a volume is channels_last_3d."""
    if memory_format == torch.channels_last and t.dim() == 5:
        memory_format = torch.channels_last_3d
    return t.contiguous(memory_format=memory_format)


def far_apart(x: Tensor) -> Tensor:
    """Return `x` in channels_last with 2^31 elements between its samples. Nobody touches the memory between."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # which would fill all of it: 9 GB in fp32
    storage = torch.empty(2**31 + x[0].numel(), dtype=x.dtype)
    torch.use_deterministic_algorithms(deterministic)
    return storage.as_strided(x.shape, (2**31, *laid_out(x, torch.channels_last).stride()[1:])).copy_(x)


def to(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Cast every tensor."""
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def with_gradients(arguments: Arguments) -> Arguments:
    """Make leaves of every differentiable argument, keeping their strides."""
    names = differentiable(arguments)
    return {k: v.detach().requires_grad_() if k in names else v for k, v in arguments.items()}


def gradients(call: Callable, arguments: Arguments, dy: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every differentiable argument."""
    arguments = with_gradients(arguments)
    names = differentiable(arguments)
    grads = torch.autograd.grad(call(**arguments), [arguments[k] for k in names], dy)
    return dict(zip(names, grads, strict=True))


@functools.lru_cache(maxsize=8)
def expected(op: str, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what eager gives in `dtype`, and the fp64 reference, for the case's arguments."""
    operator = OPERATORS[op]
    arguments = operator.arguments(case, dtype)
    return operator.reference(**arguments), operator.reference(**to(arguments, torch.double))


@functools.lru_cache(maxsize=8)
def expected_gradients(op: str, case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return an incoming gradient, eager's gradients in `dtype`, and the fp64 ones."""
    operator = OPERATORS[op]
    arguments = operator.arguments(case, dtype)
    shape = operator.reference(**arguments).shape
    dy = torch.randn(shape, generator=generator("dy", op, str(case)), dtype=torch.double).to(dtype)
    wide = gradients(operator.reference, to(arguments, torch.double), dy.double())
    return dy, gradients(operator.reference, arguments, dy), wide


def check_forward(op: str, arguments: Arguments, backend: str, what: str = "", **options: Any) -> Tensor:
    """Return the result, which is as near to fp64 as eager's."""
    operator = OPERATORS[op]
    y = operator.serve(backend, **arguments, **options)
    eager, wide = operator.reference(**arguments), operator.reference(**to(arguments, torch.double))
    assert_as_good_as_eager(y, eager, wide, what=what or op)
    return y


def check_gradients(
    op: str, arguments: Arguments, dy: Tensor, backend: str, what: str = "", **options: Any
) -> dict[str, Tensor]:
    """Return the gradients, which are as near to fp64 as eager's."""
    operator = OPERATORS[op]
    actual = gradients(lambda **a: operator.serve(backend, **a, **options), arguments, dy)
    eager = gradients(operator.reference, arguments, dy)
    wide = gradients(operator.reference, to(arguments, torch.double), dy.double())
    for name, gradient in actual.items():
        # scale: the terms that a gradient sums up are about 1, so a smaller sum is one that cancelled.
        assert_as_good_as_eager(gradient, eager[name], wide[name], what=f"{what or op}: gradient of {name}", scale=1.0)
    return actual


def check(
    op: str,
    case: Case,
    dtype: torch.dtype,
    layout: torch.memory_format | Callable[[Tensor], Tensor],
    backend: str,
    runs: int = 2,
    scale: float = 0,
    compute: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Forward and gradients against fp64; the gradients of all runs have the same bits.

    `compute`: the op gets the same numbers in this dtype. Eager stays in `dtype` and is the measure.
    """
    operator = OPERATORS[op]
    arguments = to(operator.arguments(case, dtype), compute or dtype)
    dy, eager, reference_ = expected_gradients(op, case, dtype)
    dy = dy.to(compute or dtype)
    if callable(layout):
        arguments["x"] = layout(arguments["x"])
    else:
        arguments["x"], dy = (laid_out(t, layout) for t in (arguments["x"], dy))

    def call(**a: Any) -> Tensor:
        return operator.serve(backend, **a, **options)

    y, (eager_y, reference_y) = call(**arguments), expected(op, case, dtype)
    assert_as_good_as_eager(y, eager_y.to(y.dtype), reference_y, dtype=dtype)
    actual, *others = (gradients(call, arguments, dy) for _ in range(runs))
    for name, gradient in actual.items():
        assert all(torch.equal(gradient, other[name]) for other in others), f"{name} differs from run to run"
        of_eager = eager[name].to(gradient.dtype)
        assert_as_good_as_eager(gradient, of_eager, reference_[name], what=name, dtype=dtype, scale=scale)
