"""The Triton kernels for the code that both GPU backends share: `backends/gpu/mlp_cublas.py` and `downsample.py`."""

import triton
from torch import Tensor

from convnext_kernels.backends.gpu.layout import Rows, rows, vector
from convnext_kernels.backends.triton import grn, layernorm
from convnext_kernels.backends.triton.launch import launch
from convnext_kernels.backends.triton.mlp_pointwise import (
    activation_bwd_kernel,
    activation_kernel,
    mlp_output_kernel,
    scaled_gradient_kernel,
)

__all__ = ["activate", "activate_backward", "grn", "layernorm", "output", "scaled_gradient"]

_ELEMENTWISE = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
_TILE = {"BLOCK_P": 16, "BLOCK_C": 64, "num_warps": 4, "enable_fp_fusion": True}


def _elementwise(kernel: triton.JITFunction, activation: str, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    launch(kernel, (triton.cdiv(elements, _ELEMENTWISE["BLOCK"]),))(
        *tensors, elements, ACTIVATION=activation, **_ELEMENTWISE
    )


def activate(u: Tensor, h: Tensor, activation: str) -> None:
    """Write h = act(u), dense; h may be u."""
    _elementwise(activation_kernel, activation, u, h)


def activate_backward(dh: Tensor, u: Tensor, du: Tensor, activation: str) -> None:
    """Write du = dh * act'(u), dense; du may be dh."""
    _elementwise(activation_bwd_kernel, activation, dh, u, du)


def _grid(samples: int, pixels: int, channels: int) -> tuple[tuple[int], int]:
    tiles = triton.cdiv(pixels, _TILE["BLOCK_P"])
    return (samples * tiles * triton.cdiv(channels, _TILE["BLOCK_C"]),), tiles


def output(
    z: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    residual: Tensor | None,
    out: Rows,
    rounded: Tensor | None = None,
) -> None:
    """Write out = residual + s * gamma * (z + bias) of rows z (N * HW, C), or of parts (parts, N * HW, C) of their sum.

    `rounded`, like out, gets the residual.
    """
    parts = len(z) if z.dim() == 3 else 1
    other = out if residual is None else rows(residual)
    samples, channels, height, width = out.tensor.shape
    grid, tiles = _grid(samples, height * width, channels)
    parameters = vector(bias), vector(gamma), vector(drop_scale), None if residual is None else other.tensor
    sizes = height * width, tiles, height * width, *other[1:], *out[1:]
    launch(mlp_output_kernel, grid)(
        z, z.numel() // parts, *parameters, out.tensor, rounded, *sizes, C=channels, PARTS=parts, **_TILE
    )


def scaled_gradient(dout: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, d: Tensor, dz: Tensor) -> None:
    """Write rows (N * HW, C) d = s * dout and, if gamma is given, dz = gamma * d."""
    samples, channels, height, width = dout.shape
    source = rows(dout)
    grid, tiles = _grid(samples, height * width, channels)
    tensors = source.tensor, vector(gamma), vector(drop_scale), d, None if gamma is None else dz
    launch(scaled_gradient_kernel, grid)(
        *tensors, height * width, tiles, height * width, *source[1:], C=channels, **_TILE
    )
