"""The inverted bottleneck: out = residual + s * gamma * (GRN?(act(norm(x) W1^T + b1)) W2^T + b2).

Three plans, chosen by predicted time (`mlp_plan.py`):

fused    one kernel, the hidden on chip (mlp_fused.py): C up to 256, 16-bit matmuls, forward only
gemm     two matmul kernels with fused prologues and epilogues (mlp_gemm.py), backward in mlp_backward.py: 16 bits
cublas   matmuls by cuBLAS with pointwise kernels between them (backends/gpu/mlp_cublas.py): fp32, and 16 bits if faster

This file makes the arguments of these kernels.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu.layout import Rows, extent, finish, flat, like_parameter, output_rows, rows
from convnext_kernels.backends.gpu.mlp_cublas import normalised, rows_of
from convnext_kernels.backends.triton import device, grn, layernorm
from convnext_kernels.backends.triton.launch import launch, prepared
from convnext_kernels.backends.triton.mlp_backward import (
    grn_hidden_gradient_kernel,
    mlp_hidden_gradient_kernel,
    mlp_input_gradient_kernel,
    mlp_weight_gradient_kernel,
    projection_gradient_kernel,
)
from convnext_kernels.backends.triton.mlp_fused import mlp_fused_fwd_kernel
from convnext_kernels.backends.triton.mlp_gemm import (
    fold_kernel,
    mlp_expand_kernel,
    mlp_folded_expand_kernel,
    mlp_project_kernel,
)
from convnext_kernels.backends.triton.mlp_plan import FOLD_ROWS, Problem, backward_plan, forward_plan
from convnext_kernels.backends.triton.reduce import sum_partials
from convnext_kernels.backends.triton.shared import KERNELS, output
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters
from convnext_kernels.torch_versions import tf32_allowed

KEEPS_HIDDEN = True


def _problem(call: MlpCall, hidden: bool, stream: torch.dtype) -> Problem:
    """`stream`: the dtype of the residual and the result."""
    samples, channels, height, width = call.x.shape
    dtypes = call.x.dtype, call.compute_dtype, stream
    return Problem(
        samples,
        height * width,
        channels,
        call.p.pwconv1_weight.shape[0],
        call.p.grn_weight is not None,
        *(str(dtype).removeprefix("torch.") for dtype in dtypes[:2]),
        hidden,
        call.compute_dtype == torch.float32 and tf32_allowed(),
        str(stream).removeprefix("torch."),
    )


def _vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else flat(parameter)


@prepared
def forward(
    call: MlpCall,
    hidden: Tensor | None = None,
    like: Tensor | None = None,
    rounded: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the bottleneck's output with x's dtype and strides, or those of `like`.

    `hidden`, (N, hidden, H, W) channels_last in `compute_dtype`, is filled with u for the gradient, `rounded`, like
    `like` in another dtype, with the residual. `weights`: `mlp_cublas.matrices`.
    """
    like = call.x if like is None else like
    plan = forward_plan(_problem(call, hidden is not None, like.dtype), device.gpu())
    if plan.config["plan"] == "cublas":
        return mlp_cublas.forward(KERNELS, call, hidden, like, rounded, weights)
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
    samples, pixels = extent(source, other, written, merge=p.grn_weight is None)
    tiles = triton.cdiv(pixels, config["BM"])
    tile = {k: config[k] for k in ("BM", "BC", "PIECES", "BH", "num_warps", "num_stages")}

    def run(out: Tensor | None, u: Tensor | None, sums: Tensor | None, scale: Tensor | None) -> None:
        launch(mlp_fused_fwd_kernel, (samples * tiles,))(
            source.tensor,
            flat(p.norm_weight),
            _vector(p.norm_bias),
            w1,
            _vector(p.pwconv1_bias),
            w2,
            _vector(p.pwconv2_bias),
            _vector(p.gamma),
            scale,
            _vector(p.grn_bias),
            _vector(drop_scale),
            None if residual is None else other.tensor,
            out,
            None if out is None else rounded,
            u,
            sums,
            pixels,
            tiles,
            x.shape[2] * x.shape[3],
            *source[1:],
            *other[1:],
            *written[1:],
            eps,
            C=channels,
            HIDDEN=hidden,
            NORM=norm,
            ACTIVATION=activation,
            enable_fp_fusion=True,
            **tile,
        )

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
    samples, pixels = extent(source, other, written, merge=call.p.grn_weight is None)
    if "library" in config["expand"]:
        h, scale = mlp_cublas.hidden_rows(KERNELS, call, weights[0], u), None
    else:
        h, scale = _expand(config["expand"], call, weights[0], u, source, samples, pixels)
    if "library" in config["project"]:
        z = torch.mm(h, weights[1].mT)
        output(z, call.p.pwconv2_bias, call.p.gamma, call.drop_scale, call.residual, written, rounded)
    else:
        _project(config["project"], call, h, weights[1], scale, other, written, rounded, samples, pixels)


def _expand(
    config: dict, call: MlpCall, w1: Tensor, u: Tensor | None, source: Rows, samples: int, pixels: int
) -> tuple[Tensor, Tensor | None]:
    """Return the hidden, rows (N * HW, hidden), and V2's response of it."""
    x, _, p, _, eps, grn_eps, norm, activation, compute_dtype, _ = call
    channels, hidden = x.shape[1], w1.shape[0]
    tile = config["tile"]
    h = torch.empty((samples * pixels, hidden), dtype=compute_dtype, device=x.device)
    tiles = triton.cdiv(pixels, tile["BM"])
    sums = None
    if p.grn_weight is not None:
        sums = torch.empty((samples, tiles, hidden), dtype=torch.float32, device=x.device)
    options = {"C": channels, "HIDDEN": hidden, "NORM": norm, "ACTIVATION": activation, "enable_fp_fusion": True}
    kernel, parameters = mlp_expand_kernel, (_vector(p.norm_weight), _vector(p.norm_bias), w1, _vector(p.pwconv1_bias))
    if config["fold"]:
        kernel, parameters = mlp_folded_expand_kernel, _folded(p, compute_dtype)
    launch(kernel, (samples * tiles * triton.cdiv(hidden, tile["BN"]),))(
        source.tensor, *parameters, h, u, sums, pixels, tiles, *source[1:], eps, **options, **tile
    )
    return h, None if sums is None else grn.response(sums, p.grn_weight, grn_eps)


def _folded(p: MlpParameters, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W1 * weight, and the sums of its rows and b1 + W1 bias, from the parameters themselves."""
    w1 = flat(p.pwconv1_weight)
    hidden, channels = p.pwconv1_weight.shape[:2]
    folded = torch.empty((hidden, channels), dtype=compute_dtype, device=w1.device)
    columns = torch.empty((2, hidden), dtype=torch.float32, device=w1.device)
    launch(fold_kernel, (triton.cdiv(hidden, FOLD_ROWS),))(
        w1,
        flat(p.norm_weight),
        _vector(p.norm_bias),
        _vector(p.pwconv1_bias),
        folded,
        columns,
        C=channels,
        HIDDEN=hidden,
        BLOCK_H=FOLD_ROWS,
        BLOCK_C=128,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return folded, columns


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
    tile, partials = config["tile"], None
    split = tile["SPLIT"]
    if split > 1:
        partials = torch.empty((split, samples * pixels, channels), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(pixels, tile["BM"])
    launch(mlp_project_kernel, (samples * tiles * triton.cdiv(channels, tile["BN"]), split))(
        h,
        w2,
        _vector(p.pwconv2_bias),
        _vector(p.gamma),
        scale,
        _vector(p.grn_bias),
        _vector(call.drop_scale),
        None if call.residual is None else other.tensor,
        written.tensor,
        rounded,
        partials,
        pixels,
        tiles,
        x.shape[2] * x.shape[3],
        *other[1:],
        *written[1:],
        C=channels,
        HIDDEN=hidden,
        enable_fp_fusion=True,
        **tile,
    )
    if partials is not None:
        output(partials, p.pwconv2_bias, p.gamma, call.drop_scale, call.residual, written, rounded)


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
    plan = backward_plan(_problem(call, hidden is not None, dout.dtype), device.gpu())
    if plan.config["plan"] == "cublas":
        found = mlp_cublas.backward(KERNELS, dout, call, needs_norm, hidden, weights)
    else:
        found = _backward(plan.config, dout, call, mlp_cublas.matrices(call, weights), needs_norm, hidden)
    return mlp_cublas.in_order(*found, dout, call.residual, needs)


def _backward(
    config: dict,
    dout: Tensor,
    call: MlpCall,
    weights: tuple[Tensor, Tensor],
    needs_norm: list[bool],
    hidden: Tensor | None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return ([dx, dnorm_weight, dnorm_bias], of which those marked in `needs_norm`, the other gradients by name)."""
    x, _, p, drop_scale, eps, _, norm, _, compute_dtype, _ = call
    samples, channels, height, width = x.shape
    width_h = p.pwconv1_weight.shape[0]
    sample_pixels = height * width
    w1, w2 = weights
    scale = _vector(drop_scale)
    dout_rows = rows(dout)
    if dout_rows[1:] != (sample_pixels * channels, channels, 1):
        dout_rows = Rows(dout.contiguous(memory_format=torch.channels_last), sample_pixels * channels, channels, 1)
    z = normalised(KERNELS, x, p, eps, norm, compute_dtype)
    gradients: dict[str, Tensor] = {}

    library = {name for name, part in config.items() if "library" in part}
    if library & {"hidden", "weight"}:  # these read the scaled gradients in the dtype of the matmuls
        d = torch.empty((samples * sample_pixels, channels), dtype=compute_dtype, device=x.device)
        dz = d if p.gamma is None else torch.empty_like(d)
        KERNELS.scaled_gradient(dout, p.gamma, drop_scale, d, dz)
    kept = None if hidden is None else rows_of(hidden)
    if "hidden" in library:
        du, g = mlp_cublas.hidden_gradient(KERNELS, call, dz, z, w1, w2, kept)
        if p.pwconv1_bias is not None:
            gradients["pwconv1_bias"] = du.sum(dim=0, dtype=torch.float32)
    else:
        du, g = _hidden_gradient(config["hidden"]["tile"], dout_rows.tensor, call, z, w1, w2, kept, gradients)

    # weights
    if "weight" in library:
        gradients["pwconv1_weight"] = mlp_cublas.weight_product(du, z)
        g2 = mlp_cublas.weight_product(d, g).unsqueeze(0)
        d_sums = d.sum(dim=0, dtype=torch.float32).unsqueeze(0)
    else:
        tile = config["weight"]["tile"]
        dw1, _ = _weight_gradient(du, z, None, sample_pixels, tile, columns=False)
        gradients["pwconv1_weight"] = sum_partials(dw1, p.pwconv1_weight.dtype)
        if dout.element_size() == 4:  # BP 64 spills 4 bytes on sm_100
            tile = tile | {"BP": min(32, tile["BP"])}
        g2, d_sums = _weight_gradient(dout_rows.tensor, g, scale, sample_pixels, tile, columns=True)
    dw2 = torch.empty((channels, width_h), dtype=p.pwconv2_weight.dtype, device=x.device)
    db2, dgamma = (
        torch.empty(channels, dtype=torch.float32 if parameter is None else parameter.dtype, device=x.device)
        for parameter in (p.pwconv2_bias, p.gamma)
    )
    launch(projection_gradient_kernel, (channels,))(
        g2,
        d_sums,
        w2,
        _vector(p.pwconv2_bias),
        _vector(p.gamma),
        dw2,
        db2,
        None if p.gamma is None else dgamma,
        g2.shape[0],
        C=channels,
        HIDDEN=width_h,
        BLOCK_H=min(512 if compute_dtype.itemsize == 2 else 256, triton.next_power_of_2(width_h)),  # 512 spill on sm_89
        num_warps=4,
        enable_fp_fusion=True,
    )
    gradients |= {"pwconv2_weight": dw2, "pwconv2_bias": db2, "gamma": dgamma}

    of_norm = []
    if any(needs_norm) and "input" in library:
        dn = rows(mlp_cublas.as_image(torch.mm(du, w1), x))
        of_norm = layernorm.gradients(dn, x, p.norm_weight, p.norm_bias, eps, needs_norm, norm=norm)
    elif any(needs_norm):
        of_norm = _input_gradient(config["input"]["tile"], du, w1, x, p, eps, norm, needs_norm)
    named = {
        name: like_parameter(value, getattr(p, name))
        for name, value in gradients.items()
        if getattr(p, name) is not None
    }
    return of_norm, named


def _hidden_gradient(
    tile: dict,
    dout: Tensor,
    call: MlpCall,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    kept: Tensor | None,
    gradients: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return (du, what W2 multiplies); add the gradients of W1's bias and of GRN to `gradients`."""
    x, _, p, drop_scale, _, grn_eps, _, activation, compute_dtype, _ = call
    samples, channels, height, width = x.shape
    width_h, sample_pixels = w1.shape[0], height * width
    has_grn = p.grn_weight is not None
    groups, pixels = (samples, sample_pixels) if has_grn else (1, samples * sample_pixels)
    tiles = triton.cdiv(pixels, tile["BM"])
    du = torch.empty((samples * sample_pixels, width_h), dtype=compute_dtype, device=x.device)
    g = torch.empty_like(du)
    sums = torch.empty((3 if has_grn else 1, groups, tiles, width_h), dtype=torch.float32, device=x.device)
    launch(mlp_hidden_gradient_kernel, (groups * tiles * triton.cdiv(width_h, tile["BN"]),))(
        dout,
        _vector(p.gamma),
        _vector(drop_scale),
        w2,
        kept,
        z,
        w1,
        _vector(p.pwconv1_bias),
        du,
        None if has_grn and kept is not None else g,
        sums,
        sums.stride(0),
        pixels,
        tiles,
        sample_pixels,
        GRN=has_grn,
        C=channels,
        HIDDEN=width_h,
        ACTIVATION=activation,
        enable_fp_fusion=True,
        **tile,
    )
    if has_grn:
        response, per_h, partials = grn.response_backward(*sums, p.grn_weight, grn_eps)
        gradients["grn_weight"], gradients["grn_bias"] = sum_partials(partials, torch.float32)
        block = {"BLOCK_P": 32, "BLOCK_H": 64, "num_warps": 4}
        tiles = triton.cdiv(pixels, block["BLOCK_P"])
        sums = torch.empty((1, groups, tiles, width_h), dtype=torch.float32, device=x.device)
        launch(grn_hidden_gradient_kernel, (groups * tiles * triton.cdiv(width_h, block["BLOCK_H"]),))(
            du,
            g if kept is None else kept,
            g,
            response,
            flat(p.grn_bias),
            per_h,
            sums,
            pixels,
            tiles,
            HIDDEN=width_h,
            ACTIVATION=activation,
            enable_fp_fusion=True,
            **block,
        )
    if p.pwconv1_bias is not None:
        gradients["pwconv1_bias"] = sum_partials(sums.view(-1, width_h), p.pwconv1_bias.dtype)
    return du, g


def _weight_gradient(
    a: Tensor, b: Tensor, drop_scale: Tensor | None, sample_pixels: int, config: dict, columns: bool
) -> tuple[Tensor, Tensor | None]:
    """Partial sums (splits, M, N) of (s * a)^T b over the pixels and, if `columns`, (splits, M) of s * a."""
    pixels, n = b.shape
    m = a.numel() // pixels
    tiles = triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"])
    # Enough splits for two programs per multiprocessor, each with at least four steps.
    splits = min(triton.cdiv(2 * device.gpu().sms, tiles), max(1, pixels // (4 * config["BP"])))
    chunk = triton.cdiv(triton.cdiv(pixels, splits), config["BP"]) * config["BP"]
    splits = triton.cdiv(pixels, chunk)
    partials = torch.empty((splits, m, n), dtype=torch.float32, device=b.device)
    sums = torch.empty((splits, m), dtype=torch.float32, device=b.device) if columns else None
    launch(mlp_weight_gradient_kernel, (tiles, splits))(
        a, b, drop_scale, partials, sums, pixels, chunk, sample_pixels, M=m, N=n, enable_fp_fusion=True, **config
    )
    return partials, sums


def _input_gradient(
    config: dict, du: Tensor, w1: Tensor, x: Tensor, p: MlpParameters, eps: float, norm: str, needs: list[bool]
) -> list[Tensor]:
    """From du, those of [dx, dnorm_weight, dnorm_bias] that `needs` marks."""
    hidden, channels = w1.shape
    source = rows(x)
    if config["BC"] * config["PIECES"] < channels:  # a row is too long for one program
        dn = torch.empty_like(x, memory_format=torch.channels_last)
        target, norm_weight, x_tensor, partials = rows(dn), None, None, None
    else:
        dx, target = output_rows(x) if needs[0] else (None, source)
        norm_weight, x_tensor = flat(p.norm_weight), source.tensor
    samples, pixels = extent(source, target)
    tiles = triton.cdiv(pixels, config["BM"])
    programs = samples * tiles * triton.cdiv(channels, config["BC"] * config["PIECES"])
    if x_tensor is not None:
        parameters = needs[1] or needs[2]
        partials = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device) if parameters else None
    launch(mlp_input_gradient_kernel, (programs,))(
        du,
        w1,
        x_tensor,
        norm_weight,
        target.tensor if x_tensor is None or needs[0] else None,
        partials,
        pixels,
        tiles,
        *source[1:],
        *target[1:],
        eps,
        C=channels,
        HIDDEN=hidden,
        NORM=norm,
        enable_fp_fusion=True,
        **config,
    )
    if x_tensor is None:
        return layernorm.gradients(rows(dn), x, p.norm_weight, p.norm_bias, eps, needs, norm=norm)
    results = [finish(dx, target)] if needs[0] else []
    return results + layernorm.parameter_gradients(partials, (p.norm_weight, p.norm_bias), needs[1:])
