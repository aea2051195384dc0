"""The gradients of the inverted bottleneck: the arguments of mlp_backward.py's and mlp_fused_backward.py's kernels."""

import torch
import triton
from torch import Tensor

from convnext_kernels.backends.gpu import mlp_cublas
from convnext_kernels.backends.gpu.layout import Rows, extent, finish, flat, output_rows, rows, vector
from convnext_kernels.backends.gpu.mlp_cublas import normalised, rows_of
from convnext_kernels.backends.triton import device, grn, layernorm, shared
from convnext_kernels.backends.triton.kernels.mlp_backward import (
    grn_hidden_gradient_kernel,
    mlp_hidden_gradient_kernel,
    mlp_input_gradient_kernel,
    mlp_weight_gradient_kernel,
    projection_gradient_kernel,
)
from convnext_kernels.backends.triton.kernels.mlp_fused_backward import (
    mlp_data_gradient_kernel,
    mlp_recomputed_weight_gradient_kernel,
)
from convnext_kernels.backends.triton.launch import launch, loadable
from convnext_kernels.backends.triton.reduce import sum_partials
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters


def gradients(
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
    sample_pixels = height * width
    w1, w2 = weights
    dout_rows = rows(dout)
    if dout_rows[1:] != (sample_pixels * channels, channels, 1):
        dout_rows = Rows(dout.contiguous(memory_format=torch.channels_last), sample_pixels * channels, channels, 1)
    dense = dout_rows.tensor
    named: dict[str, Tensor] = {}
    of_norm: list[Tensor] = []

    library = {name for name, part in config.items() if "library" in part}
    if library & {"hidden", "weight"}:  # these read the scaled gradients in the dtype of the matmuls
        d = torch.empty((samples * sample_pixels, channels), dtype=compute_dtype, device=x.device)
        gamma = p.gamma if "hidden" in library else None
        dz = d if gamma is None else torch.empty_like(d)
        shared.scaled_gradient(dout, gamma, drop_scale, d, dz)
    if "data" in config:
        stored = "recompute" not in config["weight"]
        if stored or any(needs_norm):
            of_norm, z, du, g = _data_gradient(config["data"]["tile"], dense, call, w1, w2, needs_norm, stored, named)
        else:
            z = normalised(shared, call)
    else:
        z = normalised(shared, call)
        kept = None if hidden is None else rows_of(hidden)
        if "hidden" in library:
            du, g = mlp_cublas.hidden_gradient(shared, call, dz, z, w1, w2, kept)
            if p.pwconv1_bias is not None:
                named["pwconv1_bias"] = du.sum(dim=0, dtype=torch.float32)
        else:
            du, g = _hidden_gradient(config["hidden"]["tile"], dense, call, z, w1, w2, kept, named)
        if any(needs_norm) and "input" in library:
            dn = rows(mlp_cublas.as_image(torch.mm(du, w1), x))
            of_norm = layernorm.gradients(dn, x, p.norm_weight, p.norm_bias, eps, needs_norm, norm=norm)
        elif any(needs_norm):
            of_norm = _input_gradient(config["input"]["tile"], du, w1, call, needs_norm)

    if "recompute" in config["weight"]:
        g2, d_sums = _recomputed_weight_gradients(config["weight"]["tile"], dense, call, z, w1, w2, named)
    elif "weight" in library:
        named["pwconv1_weight"] = mlp_cublas.weight_product(du, z)
        g2 = mlp_cublas.weight_product(d, g).unsqueeze(0)
        d_sums = d.sum(dim=0, dtype=torch.float32).unsqueeze(0)
    else:
        tile = config["weight"]["tile"]
        dw1, _ = _weight_gradient(du, z, None, sample_pixels, tile, columns=False)
        named["pwconv1_weight"] = sum_partials(dw1, p.pwconv1_weight.dtype)
        if dout.element_size() == 4:  # BP 64 spills 4 bytes on sm_100
            tile = tile | {"BP": min(32, tile["BP"])}
        g2, d_sums = _weight_gradient(dense, g, vector(drop_scale), sample_pixels, tile, columns=True)
    _projection_gradient(g2, d_sums, w2, p, named)
    return of_norm, mlp_cublas.like_parameters(named, p)


def _projection_gradient(g2: Tensor, d_sums: Tensor, w2: Tensor, p: MlpParameters, named: dict[str, Tensor]) -> None:
    """Add the gradients of W2, its bias and gamma, from partial sums of G2 (splits, C, HIDDEN) and d (splits, C)."""
    channels, hidden = w2.shape
    dw2 = torch.empty((channels, hidden), dtype=p.pwconv2_weight.dtype, device=w2.device)
    db2, dgamma = (
        torch.empty(channels, dtype=torch.float32 if parameter is None else parameter.dtype, device=w2.device)
        for parameter in (p.pwconv2_bias, p.gamma)
    )
    most = 512 if w2.element_size() == 2 else 256  # 512 of fp32 spill on sm_89
    options = {"C": channels, "HIDDEN": hidden, "BLOCK_H": min(most, triton.next_power_of_2(hidden)), "num_warps": 4}
    parameters = w2, vector(p.pwconv2_bias), vector(p.gamma)
    results = dw2, db2, None if p.gamma is None else dgamma
    launch(projection_gradient_kernel, (channels,))(
        g2, d_sums, *parameters, *results, g2.shape[0], **options, enable_fp_fusion=True
    )
    named |= {"pwconv2_weight": dw2, "pwconv2_bias": db2, "gamma": dgamma}


def _data_gradient(
    tile: dict,
    dout: Tensor,
    call: MlpCall,
    w1: Tensor,
    w2: Tensor,
    needs: list[bool],
    stored: bool,
    named: dict[str, Tensor],
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """Return (those of [dx, dnorm_weight, dnorm_bias] that `needs` marks, z, du, g); the last two only if `stored`.

    Add the gradients of GRN to `named`, and that of W1's bias if `stored`.
    """
    x, _, p, drop_scale, eps, grn_eps, norm, activation, compute_dtype, _ = call
    hidden, channels = w1.shape
    source = rows(x)
    dx, target = output_rows(x) if needs[0] else (None, source)
    has_grn = p.grn_weight is not None
    samples, pixels = extent(source, target, merge=not has_grn)
    tiles = triton.cdiv(pixels, tile["BM"])
    options = {"C": channels, "HIDDEN": hidden, "NORM": norm, "ACTIVATION": activation, "enable_fp_fusion": True}
    normalised = source.tensor, flat(p.norm_weight), vector(p.norm_bias)
    weights = w1, vector(p.pwconv1_bias), w2, vector(p.gamma), vector(drop_scale)
    sizes = pixels, tiles, x.shape[2] * x.shape[3], *source[1:], *target[1:], eps

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def run(grn: tuple, outputs: tuple, sums: Tensor | None, gradient: Tensor | None, partials: Tensor | None) -> None:
        arguments = dout, *normalised, *weights, *grn, *outputs, sums, samples * tiles * hidden, gradient, partials
        launch(mlp_data_gradient_kernel, (samples * tiles,))(
            *arguments, *sizes, SUMS_ONLY=outputs[0] is None, **options, **tile
        )

    grn_arguments: tuple = (None, None, None)
    if has_grn:
        sums = floats(3, samples, tiles, hidden)
        run(grn_arguments, (None, None, None), sums, None, None)
        response, per_h, of_grn = grn.response_backward(*sums, p.grn_weight, grn_eps)
        named["grn_weight"], named["grn_bias"] = sum_partials(of_grn, torch.float32)
        grn_arguments = response, flat(p.grn_bias), per_h
    rows_out = x.shape[0] * x.shape[2] * x.shape[3]
    z = torch.empty((rows_out, channels), dtype=compute_dtype, device=x.device)
    du = g = bias = None
    if stored:
        du = torch.empty((rows_out, hidden), dtype=compute_dtype, device=x.device)
        g = torch.empty_like(du)
        bias = None if p.pwconv1_bias is None else floats(samples * tiles, hidden)
    partials = floats(samples * tiles, 2, channels) if needs[1] or needs[2] else None
    run(grn_arguments, (z, du, g), bias, None if dx is None else target.tensor, partials)
    if bias is not None:
        named["pwconv1_bias"] = sum_partials(bias, p.pwconv1_bias.dtype)
    results = [] if dx is None else [finish(dx, target)]
    return results + layernorm.parameter_gradients(partials, (p.norm_weight, p.norm_bias), needs[1:]), z, du, g


def _recomputed_weight_gradients(
    tile: dict, dout: Tensor, call: MlpCall, z: Tensor, w1: Tensor, w2: Tensor, named: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return partial sums of G2 (splits, C, HIDDEN) and of d (splits, C); add the gradients of W1 and its bias."""
    p, (pixels, channels), hidden = call.p, z.shape, w1.shape[0]
    columns = triton.cdiv(hidden, tile["BH"])
    splits, chunk = _splits(pixels, columns, tile["BP"])
    shapes = (splits, hidden, channels), (splits, hidden), (splits, channels, hidden), (splits, channels)
    dw1, db1, g2, d_sums = (torch.empty(shape, dtype=torch.float32, device=z.device) for shape in shapes)
    weights = w1, vector(p.pwconv1_bias), w2, vector(p.gamma), vector(call.drop_scale)
    sizes = pixels, chunk, call.x.shape[2] * call.x.shape[3]
    options = {"C": channels, "HIDDEN": hidden, "ACTIVATION": call.activation, "enable_fp_fusion": True}
    launch(mlp_recomputed_weight_gradient_kernel, (columns, splits))(
        dout, z, *weights, dw1, db1, g2, d_sums, *sizes, **options, **tile
    )
    named["pwconv1_weight"] = sum_partials(dw1, p.pwconv1_weight.dtype)
    if p.pwconv1_bias is not None:
        named["pwconv1_bias"] = sum_partials(db1, p.pwconv1_bias.dtype)
    return g2, d_sums


def _splits(pixels: int, programs: int, block: int) -> tuple[int, int]:
    """Return (splits, pixels of each): two programs per multiprocessor, each with at least four steps of `block`."""
    splits = min(triton.cdiv(2 * device.gpu().sms, programs), max(1, pixels // (4 * block)))
    chunk = triton.cdiv(triton.cdiv(pixels, splits), block) * block
    return triton.cdiv(pixels, chunk), chunk


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
    scales = vector(p.gamma), vector(drop_scale)
    hidden = None if has_grn and kept is not None else g
    results = du, hidden, sums, sums.stride(0), pixels, tiles, sample_pixels
    options = {"HIDDEN": width_h, "ACTIVATION": activation, "enable_fp_fusion": True}
    launch(mlp_hidden_gradient_kernel, (groups * tiles * triton.cdiv(width_h, tile["BN"]),))(
        dout, *scales, w2, kept, z, w1, vector(p.pwconv1_bias), *results, GRN=has_grn, C=channels, **options, **tile
    )
    if has_grn:
        response, per_h, partials = grn.response_backward(*sums, p.grn_weight, grn_eps)
        gradients["grn_weight"], gradients["grn_bias"] = sum_partials(partials, torch.float32)
        block = {"BLOCK_P": 32, "BLOCK_H": 64, "num_warps": 4}
        tiles = triton.cdiv(pixels, block["BLOCK_P"])
        sums = torch.empty((1, groups, tiles, width_h), dtype=torch.float32, device=x.device)
        factors = response, flat(p.grn_bias), per_h
        launch(grn_hidden_gradient_kernel, (groups * tiles * triton.cdiv(width_h, block["BLOCK_H"]),))(
            du, g if kept is None else kept, g, *factors, sums, pixels, tiles, **options, **block
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
    config = loadable(config, a, b)
    tiles = triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"])
    splits, chunk = _splits(pixels, tiles, config["BP"])
    partials = torch.empty((splits, m, n), dtype=torch.float32, device=b.device)
    sums = torch.empty((splits, m), dtype=torch.float32, device=b.device) if columns else None
    launch(mlp_weight_gradient_kernel, (tiles, splits))(
        a, b, drop_scale, partials, sums, pixels, chunk, sample_pixels, M=m, N=n, enable_fp_fusion=True, **config
    )
    return partials, sums


def _input_gradient(config: dict, du: Tensor, w1: Tensor, call: MlpCall, needs: list[bool]) -> list[Tensor]:
    """From du, those of [dx, dnorm_weight, dnorm_bias] that `needs` marks."""
    x, p, eps, norm = call.x, call.p, call.eps, call.norm
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
    written = target.tensor if x_tensor is None or needs[0] else None
    sizes = pixels, tiles, *source[1:], *target[1:], eps
    options = {"C": channels, "HIDDEN": hidden, "NORM": norm, "enable_fp_fusion": True}
    launch(mlp_input_gradient_kernel, (programs,))(
        du, w1, x_tensor, norm_weight, written, partials, *sizes, **options, **config
    )
    if x_tensor is None:
        return layernorm.gradients(rows(dn), x, p.norm_weight, p.norm_bias, eps, needs, norm=norm)
    results = [finish(dx, target)] if needs[0] else []
    return results + layernorm.parameter_gradients(partials, (p.norm_weight, p.norm_bias), needs[1:])
