"""The CUDA kernels for the code that both GPU backends share: `backends/gpu/mlp_cublas.py` and `downsample.py`."""

from torch import Tensor

from convnext_kernels.backends.cuda import grn, layernorm, native
from convnext_kernels.backends.gpu.kernels import Kernels
from convnext_kernels.backends.gpu.layout import Rows, extent, flat, rows


def vector(parameter: Tensor | None) -> tuple | None:
    """A parameter that may be missing."""
    return native.vector(None if parameter is None else flat(parameter))


def _activate(u: Tensor, h: Tensor, activation: str) -> None:
    codes = native.DTYPE_CODES[u.dtype], native.activation_code(activation)
    native.kernels().activate(native.context(u), *codes, native.address(u), native.address(h), u.numel())


def _activate_backward(dh: Tensor, u: Tensor, du: Tensor, activation: str) -> None:
    codes = native.DTYPE_CODES[u.dtype], native.activation_code(activation)
    addresses = map(native.address, (dh, u, du))
    native.kernels().activate_backward(native.context(u), *codes, *addresses, u.numel())


def _output(
    z: Tensor, bias: Tensor | None, gamma: Tensor | None, drop_scale: Tensor | None, residual: Tensor | None, out: Rows
) -> None:
    other = None if residual is None else rows(residual)
    samples, pixels = extent(out, *([] if other is None else [other]), merge=drop_scale is None)
    native.kernels().mlp_output(
        native.context(z),
        native.DTYPE_CODES[z.dtype],
        native.address(z),
        vector(bias),
        vector(gamma),
        vector(drop_scale),
        native.rows(other),
        native.rows(out),
        samples,
        pixels,
        z.shape[1],
    )


def _scaled_gradient(dout: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, d: Tensor, dz: Tensor) -> None:
    source = rows(dout)
    samples, pixels = extent(source, merge=drop_scale is None)
    native.kernels().scaled_gradient(
        native.context(dout),
        native.rows(source),
        vector(gamma),
        vector(drop_scale),
        native.DTYPE_CODES[d.dtype],
        native.address(d),
        0 if gamma is None else native.address(dz),
        samples,
        pixels,
        dout.shape[1],
    )


KERNELS = Kernels(
    normalize=layernorm.normalize,
    layernorm_gradients=layernorm.gradients,
    grn_forward=grn.forward,
    grn_backward=grn.backward,
    activate=_activate,
    activate_backward=_activate_backward,
    output=_output,
    scaled_gradient=_scaled_gradient,
)
