"""Global response normalisation (ConvNeXt V2) of (N, C, H, W), and its gradients, by csrc/cuda/grn.cu.

Three launches each for forward and backward: sums over tiles of pixels, the factors of each sample, the result.
"""

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.cuda.layernorm import parameter_gradients
from convnext_kernels.backends.gpu.layout import Rows, finish, output_rows, rows
from convnext_kernels.calls import NormCall


def _sizes(x: Rows) -> tuple[int, int, int]:
    samples, channels, height, width = x.tensor.shape
    return samples, height * width, channels


def _sums(x: Rows, dy: Rows | None) -> Tensor:
    """Sums over tiles of pixels of x^2 and, with dy, of dy * x and dy: (1 or 3, N, T, C) fp32."""
    samples, pixels, channels = _sizes(x)
    shape = (1 if dy is None else 3, samples, native.extension().grn_tiles(pixels), channels)
    sums = torch.empty(shape, dtype=torch.float32, device=x.tensor.device)
    addresses = [native.address(s) for s in sums] + [0, 0]
    native.kernels().grn_sums(
        native.context(x.tensor), native.rows(x), native.rows(dy), *addresses[:3], samples, pixels, channels
    )
    return sums


def response(squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    """From sums of x^2 over tiles of pixels, (N, T, C) fp32, return 1 + weight * Nx, (N, C) fp32. One launch."""
    samples, tiles, channels = squares.shape
    scale = torch.empty((samples, channels), dtype=torch.float32, device=squares.device)
    arguments = native.address(squares), native.vector(weight), native.address(scale), eps, samples, tiles, channels
    native.kernels().grn_response(native.context(squares), *arguments)
    return scale


def response_backward(
    squares: Tensor, dy_x: Tensor, dy_sum: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From sums of x^2, dy * x and dy over tiles of pixels, (N, T, C) fp32 each, return (scale, per_x, parameters).

    dx = dy * scale + x * per_x, both (N, C) fp32; `parameters` (N, 2, C) fp32 holds each sample's dweight and dbias,
    for `layernorm.parameter_gradients` to sum. One launch.
    """
    samples, tiles, channels = squares.shape
    scale, per_x = torch.empty((2, samples, channels), dtype=torch.float32, device=squares.device)
    parameters = torch.empty((samples, 2, channels), dtype=torch.float32, device=squares.device)
    sums, results = map(native.address, (squares, dy_x, dy_sum)), map(native.address, (scale, per_x, parameters))
    native.kernels().grn_response_backward(
        native.context(squares), *sums, native.vector(weight), *results, eps, samples, tiles, channels
    )
    return scale, per_x, parameters


def _apply(a: Rows, b: Rows | None, out: Rows, scale: Tensor, per_b: Tensor | None, bias: Tensor | None) -> None:
    """Compute out = a * scale + b * per_b, or a * scale + bias."""
    tensors = *map(native.rows, (a, b, out)), native.address(scale), native.address(per_b), native.vector(bias)
    native.kernels().grn_apply(native.context(a.tensor), *tensors, *_sizes(a))


def apply(x: Rows, scale: Tensor, bias: Tensor, y: Rows) -> None:
    """Write y = x * scale[n, c] + bias[c]; y may be x."""
    _apply(x, None, y, scale, None, bias)


@native.prepared
def forward(call: NormCall) -> Tensor:
    """GRN of (N, C, H, W); the result has x's dtype and strides."""
    x, weight, bias, eps, *_ = call
    source = rows(x)
    out, target = output_rows(x)
    (squares,) = _sums(source, None)
    apply(source, response(squares, weight, eps), bias, target)
    return finish(out, target)


@native.prepared
def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; bitwise the same every time."""
    x, weight, bias, eps, *_ = call
    source, gradient = rows(x), rows(dy.to(x.dtype))
    scale, per_x, parameters = response_backward(*_sums(source, gradient), weight, eps)
    results = []
    if needs[0]:
        dx, target = output_rows(x)
        _apply(gradient, source, target, scale, per_x, None)
        results.append(finish(dx, target))
    if needs[1] or needs[2]:
        results += parameter_gradients(parameters, (weight, bias), needs[1:])
    return results
