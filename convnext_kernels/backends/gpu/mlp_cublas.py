"""The inverted bottleneck with matmuls by cuBLAS and one pointwise kernel between them.

This plan serves fp32, and 16 bits if it is predicted to be the fastest or the backend has no other. With d = s * dout,
G2 = d^T h and dz = gamma d:

    dW2 = gamma o G2,    db2 = gamma o sum(d),    dgamma = rowsum(W2 o G2) + b2 o sum(d)
    dh = dz W2,    du = dh act'(u),    dW1 = du^T z,    db1 = sum(du),    dnorm(x) = du W1

so the output of W2 is not needed again. fp32 matmuls obey torch's TF32 switches because torch runs them.

`kernels` is the backend's module `shared`: the modules `layernorm` and `grn`, and launchers that write to their last
arguments, of any dtype.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from convnext_kernels.backends.gpu import prepared as programs
from convnext_kernels.backends.gpu.layout import Rows, finish, flat, like_parameter, output_rows, rows
from convnext_kernels.calls import MlpCall, NormCall
from convnext_kernels.spec import MlpParameters
from convnext_kernels.torch_versions import exact_mm


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A pointwise weight as a dense (out, in) matrix in the dtype of the matmuls."""
    return weight.detach().flatten(1).to(dtype).contiguous()


def matrices(call: MlpCall, weights: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Both pointwise weights as `matrix`; `weights` are these if the call's were cast before."""
    w1, w2 = weights or (call.p.pwconv1_weight, call.p.pwconv2_weight)
    return matrix(w1, call.compute_dtype), matrix(w2, call.compute_dtype)


def normalised(kernels: ModuleType, call: MlpCall) -> Tensor:
    """The norm of x as dense rows (N * HW, C) in `compute_dtype`."""
    x, p = call.x, call.p
    samples, channels, height, width = x.shape
    pixels = height * width
    z = torch.empty((samples * pixels, channels), dtype=call.compute_dtype, device=x.device)
    written = Rows(z, pixels * channels, channels, 1)
    kernels.layernorm.normalize(x, p.norm_weight, p.norm_bias, call.eps, written, norm=call.norm)
    return z


def as_image(values: Tensor, x: Tensor) -> Tensor:
    """View rows (N * HW, D) as (N, D, H, W)."""
    return values.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def rows_of(image: Tensor) -> Tensor:
    """View a channels_last (N, D, H, W) as rows (N * HW, D)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def weight_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of rows (N * HW, M) and (N * HW, K), summed in fp32: cuBLAS may split a sum over many pixels."""
    recorder = programs.recorder()
    if recorder is None:
        return exact_mm(a.mT, b)
    product = torch.mm(a.mT, b)
    recorder.steps[-1].function = exact_mm
    return product


def hidden_gradient(
    kernels: ModuleType, call: MlpCall, dz: Tensor, z: Tensor, w1: Tensor, w2: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(du, act(u)) without GRN; `kept` is u, which is computed again without it."""
    dh = torch.mm(dz, w2)
    u = _hidden(z, w1, call) if kept is None else kept
    h = torch.empty_like(u)
    kernels.activate(u, h, call.activation)
    kernels.activate_backward(dh, u, dh, call.activation)
    return dh, h


def _hidden(z: Tensor, w1: Tensor, call: MlpCall, out: Tensor | None = None) -> Tensor:
    if call.p.pwconv1_bias is None:
        return torch.mm(z, w1.mT, out=out)
    return torch.addmm(flat(call.p.pwconv1_bias).to(call.compute_dtype), z, w1.mT, out=out)


def hidden_rows(kernels: ModuleType, call: MlpCall, w1: Tensor, kept: Tensor | None) -> Tensor:
    """The hidden of x as rows (N * HW, hidden) in `compute_dtype`; `kept`, like it, is filled with u."""
    u = _hidden(normalised(kernels, call), w1, call, out=kept)
    h = u if kept is None else torch.empty_like(u)
    kernels.activate(u, h, call.activation)
    return h


def forward(
    kernels: ModuleType,
    call: MlpCall,
    hidden: Tensor | None = None,
    like: Tensor | None = None,
    rounded: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the bottleneck's output with x's dtype and strides, or those of `like`.

    `hidden`, (N, hidden, H, W) channels_last in `compute_dtype`, is filled with u for the gradient, `rounded`, like
    `like` in another dtype, with the residual. `weights`: `matrices`.
    """
    x, residual, p, drop_scale, _, grn_eps, *_ = call
    w1, w2 = matrices(call, weights)
    h = hidden_rows(kernels, call, w1, None if hidden is None else rows_of(hidden))
    if p.grn_weight is not None:
        h = rows_of(kernels.grn.forward(NormCall(as_image(h, x), p.grn_weight, p.grn_bias, grn_eps)))
    z = torch.mm(h, w2.mT)
    out, written = output_rows(x if like is None else like)
    if rounded is not None:
        rounded.copy_(residual)
    kernels.output(z, p.pwconv2_bias, p.gamma, drop_scale, residual, written)
    return finish(out, written)


def backward(
    kernels: ModuleType,
    dout: Tensor,
    call: MlpCall,
    needs_input: list[bool],
    hidden: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return ([dx, dnorm_weight, dnorm_bias], of which those marked in `needs_input`, the other gradients by name)."""
    x, _, p, drop_scale, eps, grn_eps, norm, activation, compute_dtype, _ = call
    z = normalised(kernels, call)
    w1, w2 = matrices(call, weights)
    u = _hidden(z, w1, call) if hidden is None else rows_of(hidden)
    h = torch.empty_like(u)
    kernels.activate(u, h, activation)
    d = torch.empty((z.shape[0], dout.shape[1]), dtype=compute_dtype, device=dout.device)
    dz = d if p.gamma is None else torch.empty_like(d)
    kernels.scaled_gradient(dout, p.gamma, drop_scale, d, dz)
    gradients: dict[str, Tensor] = {}
    dh = torch.mm(dz, w2)
    g = h
    if p.grn_weight is not None:
        image = as_image(h, x)
        g = rows_of(kernels.grn.forward(NormCall(image, p.grn_weight, p.grn_bias, grn_eps)))
        dh, gradients["grn_weight"], gradients["grn_bias"] = kernels.grn.backward(
            as_image(dh, x), NormCall(image, p.grn_weight, p.grn_bias, grn_eps), [True, True, True]
        )
        dh = rows_of(dh)
    g2 = weight_product(d, g)
    d_sum = d.sum(dim=0, dtype=torch.float32)
    if p.gamma is None:
        gradients["pwconv2_weight"], gradients["pwconv2_bias"] = g2, d_sum
    else:
        gamma = flat(p.gamma).float()
        gradients["pwconv2_weight"], gradients["pwconv2_bias"] = g2 * gamma.to(g2.dtype).unsqueeze(1), d_sum * gamma
        gradients["gamma"] = (w2.float() * g2).sum(dim=1)
        if p.pwconv2_bias is not None:
            gradients["gamma"] += flat(p.pwconv2_bias).float() * d_sum
    du = dh
    kernels.activate_backward(dh, u, du, activation)
    gradients["pwconv1_weight"] = weight_product(du, z)
    gradients["pwconv1_bias"] = du.sum(dim=0, dtype=torch.float32)
    normal = []
    if any(needs_input):
        dn = as_image(torch.mm(du, w1), x)
        normal = kernels.layernorm.gradients(rows(dn), x, p.norm_weight, p.norm_bias, eps, needs_input, norm=norm)
    return normal, like_parameters(gradients, p)


def like_parameters(named: dict[str, Tensor], p: MlpParameters) -> dict[str, Tensor]:
    """Gradients by name, each like its parameter; without those of parameters that are None."""
    held = {name: getattr(p, name) for name in named}
    return {name: like_parameter(named[name], like) for name, like in held.items() if like is not None}


def in_order(
    normal: list[Tensor], named: dict[str, Tensor], dout: Tensor, residual: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """From the results of `backward`: the gradients of (x, residual, *p) that `needs` marks, in that order."""
    norm = iter(normal)
    results = [next(norm)] if needs[0] else []
    if needs[1]:
        results.append(torch.empty_like(residual).copy_(dout))  # an op may not return its input
    results += [next(norm) for needed in needs[2:4] if needed]
    names = MlpParameters._fields[2:]
    return results + [named[name] for name, needed in zip(names, needs[4:], strict=True) if needed]
