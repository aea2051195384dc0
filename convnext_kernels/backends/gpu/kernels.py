"""The kernels that a GPU backend passes to the code that both GPU backends share: `mlp_cublas.py`, `downsample.py`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Parameter = Tensor | None


@dataclass(frozen=True)
class Kernels:
    """Launchers of one backend. Those that return nothing write to their last tensors or `Rows`, of any dtype."""

    # (x, weight, bias, eps, out: Rows, *, patch=1, norm="layer"): LayerNorm or another norm, in the
    # order of pixels or of patches (`patch_rows`); weight and bias (C,), or for dense rows (N, C): of each sample
    normalize: Callable
    # (dy: Rows, x, weight, bias, eps, needs, patch=1, norm="layer") -> gradients of (x, weight, bias) that
    # `needs` marks
    layernorm_gradients: Callable
    # (NormCall) -> y
    grn_forward: Callable
    # (dy, NormCall, needs) -> gradients of (x, weight, bias) that `needs` marks
    grn_backward: Callable
    # (u, h, activation): h = act(u), dense; h may be u
    activate: Callable[[Tensor, Tensor, str], None]
    # (dh, u, du, activation): du = dh * act'(u), dense; du may be dh
    activate_backward: Callable[[Tensor, Tensor, Tensor, str], None]
    # (z, bias, gamma, drop_scale, residual, out: Rows): out = residual + s * gamma * (z + bias) of rows z (N * HW, C)
    output: Callable
    # (dout, gamma, drop_scale, d, dz): rows (N * HW, C) d = s * dout and, if gamma is given, dz = gamma * d
    scaled_gradient: Callable[[Tensor, Parameter, Parameter, Tensor, Tensor], None]
