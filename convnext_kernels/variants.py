"""What a block may have in place of LayerNorm and the exact GELU: two closed lists, with formulas and sources.

These are the reference and what exporters see. The same formulas are in `backends/triton/kernels/activations.py`,
`csrc/cpu/activations.h` and `csrc/cuda/activations.h`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# layer   LayerNorm (arXiv 1607.06450): (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance
# rms     RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight
# simple  timm's SimpleNorm: x / sqrt(var + eps) * weight, with the unbiased variance (C - 1), nothing subtracted
NORMS = ("layer", "rms", "simple")


class Activation(NamedTuple):
    """A function of one number, between expand and project."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (dh, u) -> du = dh * forward'(u)


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


def _quick_gelu_backward(dh: Tensor, u: Tensor) -> Tensor:
    wide = u.float() if u.dtype.itemsize == 2 else u
    s = torch.sigmoid(1.702 * wide)
    return (dh * (s + 1.702 * wide * s * (1 - s))).to(u.dtype)


_aten = torch.ops.aten
ACTIVATIONS = {
    # u Phi(u), Phi the normal CDF (arXiv 1606.08415)
    "gelu": Activation(F.gelu, lambda dh, u: _aten.gelu_backward(dh, u)),
    # u sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3)), the same paper's approximation with tanh
    "gelu_tanh": Activation(
        lambda u: F.gelu(u, approximate="tanh"), lambda dh, u: _aten.gelu_backward(dh, u, approximate="tanh")
    ),
    # u sigmoid(1.702 u), the same paper's other approximation
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    # u sigmoid(u) (arXiv 1702.03118; Swish, 1710.05941)
    "silu": Activation(F.silu, lambda dh, u: _aten.silu_backward(dh, u)),
    # u tanh(log(1 + e^u)) (arXiv 1908.08681)
    "mish": Activation(F.mish, lambda dh, u: _aten.mish_backward(dh, u)),
    # max(u, 0)
    "relu": Activation(F.relu, lambda dh, u: _aten.threshold_backward(dh, u, 0)),
    # min(max(u, 0), 6) (arXiv 1704.04861)
    "relu6": Activation(F.relu6, lambda dh, u: _aten.hardtanh_backward(dh, u, 0, 6)),
    # u min(max(u + 3, 0), 6) / 6 (arXiv 1905.02244)
    "hardswish": Activation(F.hardswish, lambda dh, u: _aten.hardswish_backward(dh, u)),
}
LAYER, GELU = NORMS[0], "gelu"  # ConvNeXt's own


def scaled(x: Tensor, weight: Tensor, eps: float, norm: str) -> Tensor:
    """RMSNorm or SimpleNorm of (..., C); 16-bit values are widened to fp32 and rounded once."""
    wide = x.float() if x.dtype.itemsize == 2 else x
    square = (wide * wide).mean(-1, keepdim=True) if norm == "rms" else wide.var(-1, keepdim=True)
    y = wide * torch.rsqrt(square + eps) * weight
    return y if y.dtype == x.dtype else y.to(x.dtype)


def scaled_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of `scaled`. With xhat = x rstd and g = dy weight: dx = rstd (g - s sum(g xhat) / count), where
    s = xhat and count = C for "rms", s = (x - mean) rstd and count = C - 1 for "simple"; dweight = sum dy xhat.
    """
    wide, dy = (t.float() if t.dtype.itemsize == 2 else t for t in (x, dy))
    rms = norm == "rms"
    square = (wide * wide).mean(-1, keepdim=True) if rms else wide.var(-1, keepdim=True)
    rstd = torch.rsqrt(square + eps)
    xhat, g = wide * rstd, dy * weight
    slope = xhat if rms else (wide - wide.mean(-1, keepdim=True)) * rstd
    along = (g * xhat).sum(-1, keepdim=True) / (x.shape[-1] if rms else x.shape[-1] - 1)
    dweight = (dy * xhat).flatten(0, -2).sum(0)
    return (rstd * (g - slope * along)).to(x.dtype), dweight


def identity_norm(x: Tensor) -> tuple[Tensor, float]:
    """RMSNorm's weight and eps with which it returns x (N, C, ...), as long as the mean of x^2 is far below eps.

    x / sqrt(mean(x^2) + 4^p) * 2^p; for x that is normalised already. Powers of two, so that nothing is rounded.
    """
    power = 15 if x.dtype == torch.float16 else 30  # 2^16 is infinite in fp16
    return constant(x, 2.0**power), 4.0**power


def constant(x: Tensor, value: float) -> Tensor:
    """A vector of `value` for the channels of x (N, C, ...)."""
    if torch.compiler.is_compiling():
        return x.new_full((x.shape[1],), value)
    return _constant(x.shape[1], value, x.dtype, x.device)


@functools.lru_cache(maxsize=64)
def _constant(channels: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # The same tensor every time: the CPU backend keeps packed parameters by address.
    with torch.inference_mode(False):
        return torch.full((channels,), value, dtype=dtype, device=device)
