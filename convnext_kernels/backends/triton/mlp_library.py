"""The bottleneck with the library's matrix products (cuBLAS) and one pointwise kernel between them: the plan for fp32,
and for wide 16-bit stages where it is predicted to win. Formulas as in mlp_backward.py.

fp32 products obey torch's TF32 switches because torch runs them.
"""

import torch
import triton
from torch import Tensor

from convnext_kernels.backends.triton import grn, layernorm
from convnext_kernels.backends.gpu.layout import Rows, finish, flat, like_parameter, output_rows, rows
from convnext_kernels.backends.triton.mlp_pointwise import (
    gelu_bwd_kernel,
    gelu_kernel,
    mlp_output_kernel,
    scaled_gradient_kernel,
)
from convnext_kernels.spec import MlpParameters

_ELEMENTWISE = {"BLOCK": 1024, "num_warps": 4}
_TILE = {"BLOCK_P": 16, "BLOCK_C": 64, "num_warps": 4}


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A pointwise weight as a dense (out, in) matrix in the dtype of the products."""
    return weight.detach().flatten(1).to(dtype).contiguous()


def normalised(x: Tensor, p: MlpParameters, eps: float, compute_dtype: torch.dtype) -> Tensor:
    """LN(x) as dense rows (N * HW, C) in `compute_dtype`."""
    samples, channels, height, width = x.shape
    pixels = height * width
    z = torch.empty((samples * pixels, channels), dtype=compute_dtype, device=x.device)
    layernorm.normalize(x, p.norm_weight, p.norm_bias, eps, Rows(z, pixels * channels, channels, 1))
    return z


def as_image(values: Tensor, x: Tensor) -> Tensor:
    """View rows (N * HW, D) as (N, D, H, W)."""
    return values.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def rows_of(image: Tensor) -> Tensor:
    """View a channels_last (N, D, H, W) as rows (N * HW, D)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _elementwise(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    kernel[(triton.cdiv(elements, _ELEMENTWISE["BLOCK"]),)](*tensors, elements, **_ELEMENTWISE)


def _grid(samples: int, pixels: int, channels: int) -> tuple[tuple[int], int]:
    tiles = triton.cdiv(pixels, _TILE["BLOCK_P"])
    return (samples * tiles * triton.cdiv(channels, _TILE["BLOCK_C"]),), tiles


def _hidden(z: Tensor, p: MlpParameters, compute_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    w1 = matrix(p.pwconv1_weight, compute_dtype)
    if p.pwconv1_bias is None:
        return torch.mm(z, w1.mT, out=out)
    return torch.addmm(flat(p.pwconv1_bias).to(compute_dtype), z, w1.mT, out=out)


def forward(
    x: Tensor,
    residual: Tensor | None,
    p: MlpParameters,
    drop_scale: Tensor | None,
    eps: float,
    grn_eps: float,
    compute_dtype: torch.dtype,
    hidden: Tensor | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """As `mlp.forward`."""
    u = _hidden(normalised(x, p, eps, compute_dtype), p, compute_dtype, None if hidden is None else rows_of(hidden))
    h = u if hidden is None else torch.empty_like(u)
    _elementwise(gelu_kernel, u, h)
    if p.grn_weight is not None:
        h = rows_of(grn.forward(as_image(h, x), p.grn_weight, p.grn_bias, grn_eps))
    z = torch.mm(h, matrix(p.pwconv2_weight, compute_dtype).mT)
    out, written = output_rows(x if like is None else like)
    other = written if residual is None else rows(residual)
    samples, channels, height, width = x.shape
    grid, tiles = _grid(samples, height * width, channels)
    mlp_output_kernel[grid](
        z,
        None if p.pwconv2_bias is None else flat(p.pwconv2_bias),
        None if p.gamma is None else flat(p.gamma),
        None if drop_scale is None else flat(drop_scale),
        None if residual is None else other.tensor,
        written.tensor,
        height * width,
        tiles,
        height * width,
        *other[1:],
        *written[1:],
        C=channels,
        **_TILE,
    )
    return finish(out, written)


def _scaled(
    dout: Tensor, gamma: Tensor | None, drop_scale: Tensor | None, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(s * dout, s * gamma * dout) as dense rows in `compute_dtype`."""
    samples, channels, height, width = dout.shape
    source = rows(dout)
    d = torch.empty((samples * height * width, channels), dtype=compute_dtype, device=dout.device)
    dz = d if gamma is None else torch.empty_like(d)
    grid, tiles = _grid(samples, height * width, channels)
    scaled_gradient_kernel[grid](
        source.tensor,
        None if gamma is None else flat(gamma),
        None if drop_scale is None else flat(drop_scale),
        d,
        None if gamma is None else dz,
        height * width,
        tiles,
        height * width,
        *source[1:],
        C=channels,
        **_TILE,
    )
    return d, dz


def backward(
    dout: Tensor,
    x: Tensor,
    p: MlpParameters,
    drop_scale: Tensor | None,
    eps: float,
    grn_eps: float,
    compute_dtype: torch.dtype,
    needs_input: list[bool],
    hidden: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """([dx, dnorm_weight, dnorm_bias] as `needs_input` marks them, gradients of the other parameters by name)."""
    z = normalised(x, p, eps, compute_dtype)
    u = _hidden(z, p, compute_dtype) if hidden is None else rows_of(hidden)
    h = torch.empty_like(u)
    _elementwise(gelu_kernel, u, h)
    d, dz = _scaled(dout, p.gamma, drop_scale, compute_dtype)
    w1, w2 = matrix(p.pwconv1_weight, compute_dtype), matrix(p.pwconv2_weight, compute_dtype)
    gradients: dict[str, Tensor] = {}
    dh = torch.mm(dz, w2)
    g = h
    if p.grn_weight is not None:
        image = as_image(h, x)
        g = rows_of(grn.forward(image, p.grn_weight, p.grn_bias, grn_eps))
        dh, gradients["grn_weight"], gradients["grn_bias"] = grn.backward(
            as_image(dh, x), image, p.grn_weight, p.grn_bias, grn_eps, [True, True, True]
        )
        dh = rows_of(dh)
    g2 = torch.mm(d.mT, g)
    d_sum = d.float().sum(dim=0)
    if p.gamma is None:
        gradients["pwconv2_weight"], gradients["pwconv2_bias"] = g2, d_sum
    else:
        gamma = flat(p.gamma).float()
        gradients["pwconv2_weight"], gradients["pwconv2_bias"] = g2 * gamma.to(g2.dtype).unsqueeze(1), d_sum * gamma
        gradients["gamma"] = (w2.float() * g2).sum(dim=1)
        if p.pwconv2_bias is not None:
            gradients["gamma"] += flat(p.pwconv2_bias).float() * d_sum
    du = dh
    _elementwise(gelu_bwd_kernel, dh, u, du)
    gradients["pwconv1_weight"] = torch.mm(du.mT, z)
    gradients["pwconv1_bias"] = du.float().sum(dim=0)
    normal = []
    if any(needs_input):
        dn = as_image(torch.mm(du, w1), x)
        normal = layernorm.gradients(rows(dn), x, p.norm_weight, p.norm_bias, eps, needs_input)
    named = {
        name: like_parameter(value, getattr(p, name))
        for name, value in gradients.items()
        if getattr(p, name) is not None
    }
    return normal, named
