"""The CUDA kernels for the code that both GPU backends share: `backends/gpu/mlp_cublas.py` and `downsample.py`."""

from torch import Tensor

from convnext_kernels.backends.cuda import grn, layernorm, native
from convnext_kernels.backends.gpu.layout import Rows, extent, rows

__all__ = ["activate", "activate_backward", "grn", "layernorm", "output", "scaled_gradient"]


def activate(u: Tensor, h: Tensor, activation: str) -> None:
    """Write h = act(u), dense; h may be u."""
    codes = native.DTYPE_CODES[u.dtype], native.activation_code(activation)
    native.kernels().activate(native.context(u), *codes, native.address(u), native.address(h), u.numel())


def activate_backward(dh: Tensor, u: Tensor, du: Tensor, activation: str) -> None:
    """Write du = dh * act'(u), dense; du may be dh."""
    codes = native.DTYPE_CODES[u.dtype], native.activation_code(activation)
    addresses = map(native.address, (dh, u, du))
    native.kernels().activate_backward(native.context(u), *codes, *addresses, u.numel())


def output(
    z: Tensor, bias: Tensor | None, gamma: Tensor | None, drop_scale: Tensor | None, residual: Tensor | None, out: Rows
) -> None:
    """Write out = residual + s * gamma * (z + bias) of rows z (N * HW, C)."""
    other = None if residual is None else rows(residual)
    samples, pixels = extent(out, *([] if other is None else [other]), merge=drop_scale is None)
    tensors = native.address(z), *map(native.vector, (bias, gamma, drop_scale)), native.rows(other), native.rows(out)
    codes = native.context(z), native.DTYPE_CODES[z.dtype]
    native.kernels().mlp_output(*codes, *tensors, samples, pixels, z.shape[1])


def scaled_gradient(dout: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, d: Tensor, dz: Tensor) -> None:
    """Write rows (N * HW, C) d = s * dout and, if gamma is given, dz = gamma * d."""
    source = rows(dout)
    samples, pixels = extent(source, merge=drop_scale is None)
    inputs = native.rows(source), native.vector(gamma), native.vector(drop_scale), native.DTYPE_CODES[d.dtype]
    results = native.address(d), 0 if gamma is None else native.address(dz)
    native.kernels().scaled_gradient(native.context(dout), *inputs, *results, samples, pixels, dout.shape[1])
