"""LayerNorm over the channels of (N, C, H, W), and its gradients, by csrc/cuda/layernorm.

Parameters, the result and the incoming gradient are rounded to x's dtype, as PyTorch does under autocast; the result
may then be stored in another dtype. Everything between is fp32.
"""

import functools

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.cuda.reduce import sum_partials
from convnext_kernels.backends.gpu import parameters
from convnext_kernels.backends.gpu.layout import (
    Rows,
    extent,
    finish,
    flat,
    like,
    like_parameter,
    output_rows,
    rows,
)
from convnext_kernels.calls import NormCall
from convnext_kernels.variants import LAYER, scaled, scaled_backward

# Sum (parts, 2, C) partial gradients of (weight, bias) and return those that are needed
parameter_gradients = functools.partial(parameters.gradients, sum_partials)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Rows,
    *,
    patch: int = 1,
    norm: str = LAYER,
) -> None:
    """The norm of (N, C, H, W) into `out` (from `output_rows`, `rows` or `patch_rows`), in out's dtype.

    weight and bias have C elements, or are (N, C): those of each sample, which PyTorch applies; `out` is dense then.
    """
    if weight is not None and weight.numel() != x.shape[1]:
        normalize(x, None, None, eps, out)
        y = out.tensor.view(x.shape[0], -1, x.shape[1])
        torch.addcmul(bias.detach().unsqueeze(1), y, weight.detach().unsqueeze(1), out=y)
        return
    if norm != LAYER and _too_wide(x):
        out.tensor.copy_(scaled(_nhwc(x), _of(weight, x), eps, norm).reshape(out.tensor.shape))
        return
    source = _source(x, norm)
    channels, height, width = x.shape[1:]
    samples, pixels = extent(source, out, merge=patch == 1)
    tensors = native.rows(source), native.rows(out), native.vector(weight), native.vector(bias)
    sizes = samples, pixels, channels, patch, height, width
    native.kernels().layernorm(native.context(x), *tensors, eps, *sizes, native.norm_code(norm))


def _too_wide(x: Tensor) -> bool:
    # In a bottleneck PyTorch's operators compute these, so that there is one kernel less to compile for each dtype and
    # architecture.
    return x.shape[1] * x.element_size() > native.NORM_ROW_BYTES


def _nhwc(x: Tensor) -> Tensor:
    return x.detach().permute(0, 2, 3, 1)


def _of(weight: Tensor, x: Tensor) -> Tensor:
    return flat(weight).to(x.dtype)


def _source(x: Tensor, norm: str) -> Rows:
    """Rows of x; for the other norms with neighbouring channels, because they have no kernel for columns."""
    return rows(x if norm == LAYER else x.contiguous(memory_format=torch.channels_last))


@native.prepared
def forward(call: NormCall) -> Tensor:
    """Normalise every pixel over its channels; the result has x's dtype and strides."""
    x, weight, bias, eps, norm, _ = call
    out, written = output_rows(x)
    normalize(x, weight, bias, eps, written, norm=norm)
    return finish(out, written)


def gradients(
    dy: Rows,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
    patch: int = 1,
    norm: str = LAYER,
) -> list[Tensor]:
    """As `backward`, for a gradient given as rows: in the order of pixels, or of patches (`patch_rows`)."""
    if norm != LAYER and _too_wide(x):
        dy_rows = dy.tensor.permute(0, 2, 3, 1).to(x.dtype)
        found, dweight = scaled_backward(dy_rows, _nhwc(x), _of(weight, x), eps, norm)
        results = [like(found.permute(0, 3, 1, 2), x)] if needs[0] else []
        return results + ([like_parameter(dweight.to(weight.dtype), weight)] if needs[1] else [])
    source = _source(x, norm)
    channels, height, width = x.shape[1:]
    dx, target = output_rows(x) if needs[0] else (None, None)
    samples, pixels = extent(source, dy, *([target] if needs[0] else []), merge=patch == 1)
    where = native.context(x)
    parts = native.extension().layernorm_parts(where, samples * pixels)
    partials = None
    if needs[1] or needs[2]:
        partials = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    tensors = native.rows(dy), native.rows(source), native.rows(target), native.vector(weight)
    sizes = samples, pixels, channels, patch, height, width
    native.kernels().layernorm_backward(
        where, *tensors, native.address(partials), parts, eps, *sizes, native.norm_code(norm)
    )
    results = [finish(dx, target)] if needs[0] else []
    return results + parameter_gradients(partials, (weight, bias), needs[1:])


@native.prepared
def backward(dy: Tensor, call: NormCall, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order; bitwise the same every time."""
    x, weight, bias, eps, norm, _ = call
    return gradients(rows(dy), x, weight, bias, eps, needs, norm=norm)
