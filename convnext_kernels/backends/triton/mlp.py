"""The inverted bottleneck: out = residual + s * gamma * (GRN?(act(norm(x) W1^T + b1)) W2^T + b2).

Three plans, chosen by predicted time (`mlp_plan.py`):

fused    one kernel, the hidden on chip (mlp_fused.py): C up to 256, 16-bit matmuls, forward only
gemm     two matmul kernels with fused prologues and epilogues (mlp_gemm.py), backward in mlp_backward.py: 16 bits
cublas   matmuls by cuBLAS with pointwise kernels between them (backends/gpu/mlp_cublas.py): fp32, and 16 bits if faster

The gradients have four plans: the last two, and two with the hidden on chip (mlp_fused_backward.py) up to C 192.

This file makes the arguments of the forward kernels, mlp_gradients.py those of the others.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu.layout import Rows, extent, finish, flat, output_rows, rows, vector
from convnext_kernels.backends.gpu.mlp_cublas import rows_of
from convnext_kernels.backends.gpu.mlp_plan import problem_of
from convnext_kernels.backends.triton import device, grn, mlp_gradients, shared
from convnext_kernels.backends.triton.kernels.mlp_fused import mlp_fused_fwd_kernel
from convnext_kernels.backends.triton.kernels.mlp_gemm import (
    mlp_expand_kernel,
    mlp_folded_expand_kernel,
    mlp_project_kernel,
)
from convnext_kernels.backends.triton.launch import launch, loadable, prepared
from convnext_kernels.backends.triton.plans.mlp_gradient_plan import backward_plan
from convnext_kernels.backends.triton.plans.mlp_plan import forward_plan
from convnext_kernels.backends.triton.weights import folded, matrices
from convnext_kernels.calls import MlpCall

KEEPS_HIDDEN = True


@prepared
def forward(
    call: MlpCall,
    hidden: Tensor | None = None,
    like: Tensor | None = None,
    rounded: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """As `mlp_cublas.forward`, by one of the plans."""
    like = call.x if like is None else like
    if weights is None and hidden is None:
        weights = matrices(call)
    plan = forward_plan(problem_of(call, hidden is not None, like.dtype), device.gpu())
    if plan.config["plan"] == "cublas":
        return mlp_cublas.forward(shared, call, hidden, like, rounded, weights)
    out, written = output_rows(like)
    launch_plan = _fused if plan.config["plan"] == "fused" else _two_products
    u = None if hidden is None else rows_of(hidden)
    if rounded is not None and written.tensor is not out:  # the kernel can only write it where it writes the result
        rounded.copy_(call.residual)
        rounded = None
    launch_plan(plan.config, call, mlp_cublas.matrices(call, weights), u, written, rounded)
    return finish(out, written)


def _fused(
    config: dict,
    call: MlpCall,
    weights: tuple[Tensor, Tensor],
    u: Tensor | None,
    written: Rows,
    rounded: Tensor | None,
) -> None:
    x, residual, p, drop_scale, eps, grn_eps, norm, activation, _, _ = call
    source = rows(x)
    other = written if residual is None else rows(residual)
    channels, hidden = x.shape[1], p.pwconv1_weight.shape[0]
    w1, w2 = weights
    samples, pixels = extent(source, other, written, merge=p.grn_weight is None and not p.adaptive)
    tiles = triton.cdiv(pixels, config["BM"])
    options = {k: config[k] for k in ("BM", "BC", "PIECES", "BH", "num_warps", "num_stages")}
    options |= {"C": channels, "HIDDEN": hidden, "NORM": norm, "ADAPTIVE": p.adaptive, "ACTIVATION": activation}
    normalised = source.tensor, flat(p.norm_weight), vector(p.norm_bias)
    first = w1, vector(p.pwconv1_bias)
    second = w2, vector(p.pwconv2_bias), vector(p.gamma)
    after = vector(p.grn_bias), vector(drop_scale), None if residual is None else other.tensor
    sizes = pixels, tiles, x.shape[2] * x.shape[3], *source[1:], *other[1:], *written[1:], eps

    def run(out: Tensor | None, u: Tensor | None, sums: Tensor | None, scale: Tensor | None) -> None:
        results = out, None if out is None else rounded, u, sums
        arguments = *normalised, *first, *second, scale, *after, *results, *sizes
        launch(mlp_fused_fwd_kernel, (samples * tiles,))(*arguments, **options, enable_fp_fusion=True)

    scale = None
    if p.grn_weight is not None:
        sums = torch.empty((samples, tiles, hidden), dtype=torch.float32, device=x.device)
        run(None, u, sums, None)
        u = None  # the first launch has stored it
        scale = grn.response(sums, p.grn_weight, grn_eps)
    run(written.tensor, u, None, scale)


def _two_products(
    config: dict,
    call: MlpCall,
    weights: tuple[Tensor, Tensor],
    u: Tensor | None,
    written: Rows,
    rounded: Tensor | None,
) -> None:
    source = rows(call.x)
    other = written if call.residual is None else rows(call.residual)
    samples, pixels = extent(source, other, written, merge=call.p.grn_weight is None and not call.p.adaptive)
    if "library" in config["expand"]:
        h, scale = mlp_cublas.hidden_rows(shared, call, weights[0], u), None
    else:
        inference = u is None and rounded is None  # or training with memory="min"
        h, scale = _expand(config["expand"], call, weights[0], u, source, samples, pixels, inference)
    if "library" in config["project"]:
        z = torch.mm(h, weights[1].mT)
        shared.output(z, call.p.pwconv2_bias, call.p.gamma, call.drop_scale, call.residual, written, rounded)
    else:
        _project(config["project"], call, h, weights[1], scale, other, written, rounded, samples, pixels)


def _expand(
    config: dict, call: MlpCall, w1: Tensor, u: Tensor | None, source: Rows, samples: int, pixels: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the hidden, rows (N * HW, hidden), and V2's response of it; `keep`: folded weights, for later calls."""
    x, _, p, _, eps, grn_eps, norm, activation, compute_dtype, _ = call
    channels, hidden = x.shape[1], w1.shape[0]
    tile = config["tile"]
    h = torch.empty((samples * pixels, hidden), dtype=compute_dtype, device=x.device)
    tiles = triton.cdiv(pixels, tile["BM"])
    sums = None
    if p.grn_weight is not None:
        sums = torch.empty((samples, tiles, hidden), dtype=torch.float32, device=x.device)
    options = {"C": channels, "HIDDEN": hidden, "NORM": norm, "ACTIVATION": activation, "enable_fp_fusion": True}
    kernel, parameters = mlp_expand_kernel, (vector(p.norm_weight), vector(p.norm_bias), w1, vector(p.pwconv1_bias))
    if config["fold"]:
        kernel, parameters = mlp_folded_expand_kernel, folded(p, compute_dtype, keep)
    else:
        options["ADAPTIVE"] = p.adaptive
    launch(kernel, (samples * tiles * triton.cdiv(hidden, tile["BN"]),))(
        source.tensor, *parameters, h, u, sums, pixels, tiles, *source[1:], eps, **options, **tile
    )
    return h, None if sums is None else grn.response(sums, p.grn_weight, grn_eps)


def _project(
    config: dict,
    call: MlpCall,
    h: Tensor,
    w2: Tensor,
    scale: Tensor | None,
    other: Rows,
    written: Rows,
    rounded: Tensor | None,
    samples: int,
    pixels: int,
) -> None:
    x, p = call.x, call.p
    channels, hidden = w2.shape
    tile, partials = loadable(config["tile"], w2), None
    split = tile["SPLIT"]
    if split > 1:
        partials = torch.empty((split, samples * pixels, channels), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(pixels, tile["BM"])
    second = w2, vector(p.pwconv2_bias), vector(p.gamma)
    after = vector(p.grn_bias), vector(call.drop_scale), None if call.residual is None else other.tensor
    sizes = pixels, tiles, x.shape[2] * x.shape[3], *other[1:], *written[1:]
    arguments = h, *second, scale, *after, written.tensor, rounded, partials, *sizes
    launch(mlp_project_kernel, (samples * tiles * triton.cdiv(channels, tile["BN"]), split))(
        *arguments, C=channels, HIDDEN=hidden, enable_fp_fusion=True, **tile
    )
    if partials is not None:
        shared.output(partials, p.pwconv2_bias, p.gamma, call.drop_scale, call.residual, written, rounded)


@prepared
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
    plan = backward_plan(problem_of(call, hidden is not None, dout.dtype), device.gpu())
    if plan.config["plan"] == "cublas":
        found = mlp_cublas.backward(shared, dout, call, needs_norm, hidden, weights)
    else:
        found = mlp_gradients.gradients(plan.config, dout, call, mlp_cublas.matrices(call, weights), needs_norm, hidden)
    return mlp_cublas.in_order(*found, dout, call.residual, needs)
