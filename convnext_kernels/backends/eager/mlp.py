"""The inverted bottleneck: out = residual + s * gamma * (GRN?(act(norm(x) W1^T + b1)) W2^T + b2).

x and residual (N, C, H, W), the norm over C; norm and activation are those of `variants`, s is the drop-path scale per
sample; gamma, GRN, the biases, s and the residual are optional. Matmuls run in `compute_dtype`; normalisation, scale
and residual run in x's dtype, which is wider under autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_kernels.backends.eager import grn, layernorm
from convnext_kernels.backends.eager.layout import like, like_parameter, nchw, nhwc
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters
from convnext_kernels.variants import ACTIVATIONS

# The gradient computes everything again from the inputs, unless the op has kept it for another backend.
KEEPS_HIDDEN = False


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.flatten().to(dtype)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.flatten(1).to(dtype)


def _per_sample(drop_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return drop_scale.reshape(-1, 1, 1, 1).to(dtype)


def _hidden(
    x: Tensor,
    p: MlpParameters,
    eps: float,
    grn_eps: float,
    norm: str,
    activation: str,
    compute_dtype: torch.dtype,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (norm(x), u: the input of the activation, its output, input of W2), all NHWC in `compute_dtype`."""
    if p.adaptive:
        weight, bias = (t.view(-1, 1, 1, x.shape[-1]).to(x.dtype) for t in (p.norm_weight, p.norm_bias))
        n = torch.addcmul(bias, layernorm.forward_nhwc(x, None, None, eps, norm), weight)
    else:
        n = layernorm.forward_nhwc(x, _cast(p.norm_weight, x.dtype), _cast(p.norm_bias, x.dtype), eps, norm)
    n = n.to(compute_dtype)
    if u is None:
        u = F.linear(n, _matrix(p.pwconv1_weight, compute_dtype), _cast(p.pwconv1_bias, compute_dtype))
    h = ACTIVATIONS[activation].forward(u)
    if p.grn_weight is None:
        return n, u, h, h
    g = grn.forward_nhwc(h, p.grn_weight.to(compute_dtype), p.grn_bias.to(compute_dtype), grn_eps)
    return n, u, h, g


def forward(call: MlpCall, hidden: Tensor | None = None) -> Tensor:
    """Return the bottleneck's output with x's dtype and strides.

    `hidden` (N, hidden, H, W) is filled with u, the input of the activation, for the gradient if it is given.
    """
    x, residual, p, drop_scale, *options, compute_dtype, _ = call
    _, u, _, g = _hidden(nhwc(x), p, *options, compute_dtype)
    if hidden is not None:
        hidden.copy_(nchw(u))
    z = F.linear(g, _matrix(p.pwconv2_weight, compute_dtype), _cast(p.pwconv2_bias, compute_dtype)).to(x.dtype)
    if p.gamma is not None:
        z = z * _cast(p.gamma, x.dtype)
    if drop_scale is not None:
        z = z * _per_sample(drop_scale, x.dtype)
    if residual is not None:
        z = nhwc(residual) + z
    return like(nchw(z), x)


def backward(dout: Tensor, call: MlpCall, needs: list[bool], hidden: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of (x, residual, *p) that `needs` marks, in that order.

    Without `hidden`, u as `forward` filled it, it is computed again. With G2 = (s * dout)^T g: dW2 = gamma * G2 and
    dgamma = rowsum(W2 * G2) + b2 * sum(s * dout), so the output of W2 is not needed.
    """
    x, residual, p, drop_scale, eps, grn_eps, norm, activation, compute_dtype, _ = call
    x_nhwc = nhwc(x).contiguous()
    dout_nhwc = nhwc(dout)
    width, channels = p.pwconv1_weight.shape[:2]
    kept = None if hidden is None else nhwc(hidden)
    n, u, h, g = _hidden(x_nhwc, p, eps, grn_eps, norm, activation, compute_dtype, kept)
    w1, w2 = _matrix(p.pwconv1_weight, compute_dtype), _matrix(p.pwconv2_weight, compute_dtype)
    gradients: dict[str, Tensor] = {}

    scaled = dout_nhwc if drop_scale is None else dout_nhwc * _per_sample(drop_scale, x.dtype)
    gamma = _cast(p.gamma, x.dtype)
    scaled_sum = scaled.sum(dim=(0, 1, 2))
    g2 = scaled.reshape(-1, channels).to(compute_dtype).mT @ g.reshape(-1, width)
    if gamma is None:
        dz = scaled
        gradients["pwconv2_weight"], gradients["pwconv2_bias"] = g2, scaled_sum
    else:
        dz = scaled * gamma
        gradients["pwconv2_weight"], gradients["pwconv2_bias"] = g2 * gamma.unsqueeze(1), scaled_sum * gamma
        gradients["gamma"] = (w2.to(x.dtype) * g2).sum(dim=1)
        if p.pwconv2_bias is not None:
            gradients["gamma"] = gradients["gamma"] + _cast(p.pwconv2_bias, x.dtype) * scaled_sum

    dg = dz.to(compute_dtype) @ w2
    if p.grn_weight is not None:
        dh, gradients["grn_weight"], gradients["grn_bias"] = grn.backward_nhwc(
            dg, h, p.grn_weight.to(compute_dtype), grn_eps
        )
    else:
        dh = dg
    du = ACTIVATIONS[activation].backward(dh, u)
    du_rows = du.reshape(-1, width)
    gradients["pwconv1_weight"] = du_rows.mT @ n.reshape(-1, channels)
    gradients["pwconv1_bias"] = du_rows.sum(dim=0)
    dn = (du @ w1).to(x.dtype)
    dx, gradients["norm_weight"], gradients["norm_bias"] = layernorm.backward_nhwc(
        dn, x_nhwc, _cast(p.norm_weight, x.dtype), _cast(p.norm_bias, x.dtype), eps, [True, True, True], norm
    )

    inputs = []
    if needs[0]:
        inputs.append(like(nchw(dx), x))
    if needs[1]:
        inputs.append(torch.empty_like(residual).copy_(dout))  # an op may not return its input
    parameters = [
        like_parameter(gradients[name], getattr(p, name))
        for name, needed in zip(MlpParameters._fields, needs[2:], strict=True)
        if needed
    ]
    return inputs + parameters
