"""The inverted bottleneck: out = residual + s * gamma * (GRN?(act(norm(x) W1^T + b1)) W2^T + b2).

Two plans, chosen by predicted time (`mlp_plan.py`):

fused    one kernel, the hidden on chip (csrc/cuda/mlp/mlp_fused.cu, mlp_fused_fp32.cu): C up to 256, forward only,
         LayerNorm, one for all samples, and exact GELU only: others would multiply the kernels that take the longest
         to compile
cublas   matmuls by cuBLAS with pointwise kernels between them (backends/gpu/mlp_cublas.py), forward and backward

This file makes the arguments of these kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from convnext_kernels.backends.cuda import grn, native, shared
from convnext_kernels.backends.cuda.mlp_plan import forward_plan, gpu_of
from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu.layout import Rows, extent, finish, output_rows, rows
from convnext_kernels.backends.gpu.mlp_cublas import matrices, rows_of
from convnext_kernels.backends.gpu.mlp_plan import problem_of
from convnext_kernels.calls import MlpCall
from convnext_kernels.variants import GELU, LAYER

KEEPS_HIDDEN = True


@native.prepared
def forward(
    call: MlpCall,
    hidden: Tensor | None = None,
    like: Tensor | None = None,
    rounded: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """As `mlp_cublas.forward`, by one of the plans."""
    x = call.x
    if (call.norm, call.activation) != (LAYER, GELU) or call.p.adaptive:
        return mlp_cublas.forward(shared, call, hidden, like, rounded, weights)
    plan = forward_plan(problem_of(call, hidden is not None, x.dtype), gpu_of(x))
    if plan.config["plan"] == "cublas":
        return mlp_cublas.forward(shared, call, hidden, like, rounded, weights)
    out, written = output_rows(x if like is None else like)
    u = None if hidden is None else rows_of(hidden)
    if rounded is not None:
        rounded.copy_(call.residual)
    _fused(plan.config["tile"], call, weights, u, written)
    return finish(out, written)


def _fused(tile: int, call: MlpCall, weights: Sequence[Tensor] | None, u: Tensor | None, written: Rows) -> None:
    x, residual, p, drop_scale, eps, grn_eps, _, _, compute_dtype, _ = call
    source = rows(x)
    other = None if residual is None else rows(residual)
    channels, hidden = x.shape[1], p.pwconv1_weight.shape[0]
    w1, w2 = matrices(call, weights)
    seen = (source, written) if other is None else (source, written, other)
    samples, pixels = extent(*seen, merge=p.grn_weight is None)
    kernel = native.kernels().mlp_fused_fp32 if compute_dtype == torch.float32 else native.kernels().mlp_fused

    inputs = native.context(x), native.DTYPE_CODES[compute_dtype], native.rows(source), native.rows(other)
    first = native.vector(p.norm_weight), native.vector(p.norm_bias), native.address(w1), native.vector(p.pwconv1_bias)
    second = native.address(w2), native.vector(p.pwconv2_bias), native.vector(p.gamma), native.vector(drop_scale)
    sizes = samples, pixels, x.shape[2] * x.shape[3], channels, hidden, eps, tile

    def run(out: Rows | None, u: Tensor | None, sums: Tensor | None, scale: Tensor | None) -> None:
        kept = native.address(scale), native.vector(p.grn_bias), native.address(u), native.address(sums)
        kernel(*inputs, native.rows(out), *first, *second, *kept, *sizes)

    scale = None
    if p.grn_weight is not None:
        sums = torch.empty((samples, -(-pixels // tile), hidden), dtype=torch.float32, device=x.device)
        run(None, u, sums, None)
        u = None  # the first launch has stored it
        scale = grn.response(sums, p.grn_weight, grn_eps)
    run(written, u, None, scale)


@native.prepared
def backward(
    dout: Tensor,
    call: MlpCall,
    needs: list[bool],
    hidden: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the gradients of (x, residual, *p) that `needs` marks, in that order; bitwise the same every time.

    `hidden` is u as `forward` filled it; without it u is computed again. `weights`: `mlp_cublas.matrices`.
    """
    needs_norm = [needs[0], needs[2], needs[3]]
    found = mlp_cublas.backward(shared, dout, call, needs_norm, hidden, weights)
    return mlp_cublas.in_order(*found, dout, call.residual, needs)
