"""Depthwise convolution, "same" padding, stride 1 or 2: y[n,c] = x[n,c] (*) weight[c] + bias[c], and its gradients.

x (N, C, H, W), weight (C, 1, KH, KW), both odd, bias (C,) or None; P = KH // 2, Q = KW // 2, (D, E) = dilation:

    y[n,c,h,w]   = bias[c] + sum_kh,kw weight[c,kh,kw] * x[n,c, h + (kh-P) D, w + (kw-Q) E]
    dx[n,c,h,w]  = sum_kh,kw weight[c,KH-1-kh,KW-1-kw] * dy[n,c, h + (kh-P) D, w + (kw-Q) E]   [+ residual]
    dw[c,kh,kw]  = sum_n,h,w dy[n,c,h,w] * x[n,c, h + (kh-P) D, w + (kw-Q) E],    db[c] = sum_n,h,w dy[n,c,h,w]

With stride 2, y[n,c,h,w] is what stands at (2h, 2w) here, and dy is between zeros. Volumes x (N, C, D, H, W) with
weight (C, 1, KD, KH, KW) have one more axis of this kind, without dilation.

Bytes per pixel with 16-bit elements: forward 4C (x read, y written), dx 4C (6C with a residual), dw and db together 4C
and the partial sums of at most a few hundred programs. For 7x7 the 49 multiply-adds of an output limit the time as much
as these bytes. Values are rounded to the compute dtype; multiplications and sums are in fp32 for every dtype.

Kernels: dwconv_forward.py, dwconv_rows.py, dwconv_wgrad.py, dwconv_lines.py for kernels of one row or one column, and
dwconv_toeplitz.py for large kernels on tensor cores.
dwconv_plan.py chooses. NHWC (channels_last) and NCHW tensors, also slices of samples, are read and written without a
copy; other strides are copied to channels_last first.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels import exporting
from convnext_kernels.backends.gpu.layout import flat
from convnext_kernels.backends.gpu.prepared import aligned
from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.dwconv_images import (
    Image,
    as_image,
    as_image_like,
    as_rows,
    channels_last,
    filled,
    in_twos,
    rounding,
    sides,
    viewed,
    weight_strides,
)
from convnext_kernels.backends.triton.kernels.dwconv_forward import pack_kernel, plane_kernel, rolling_kernel
from convnext_kernels.backends.triton.kernels.dwconv_lines import line_partials_kernel, lines_kernel
from convnext_kernels.backends.triton.kernels.dwconv_rows import rows_kernel
from convnext_kernels.backends.triton.kernels.dwconv_toeplitz import (
    copies_kernel,
    toeplitz_kernel,
    toeplitz_partials_kernel,
)
from convnext_kernels.backends.triton.kernels.dwconv_wgrad import finish_kernel, partials_kernel
from convnext_kernels.backends.triton.launch import launch, prepared
from convnext_kernels.backends.triton.plans import dwconv_plan, dwconv_toeplitz_plan
from convnext_kernels.calls import Dwconv3dCall, DwconvCall

Call = DwconvCall | Dwconv3dCall


def _block(lanes: int) -> int:
    # The interpreter's time grows with the number of programs, not of lanes
    return (
        max(dwconv_plan.BLOCK, min(4096, triton.next_power_of_2(lanes))) if device.interpreted() else dwconv_plan.BLOCK
    )


def _interpretable(config: Mapping[str, Any], p: dwconv_plan.Problem) -> dict[str, Any]:
    """The plan, changed for the interpreter, whose time grows with programs and unrolled code, not with lanes.

    Few columns; two strips if there are strips (enough for a border between them), one for a large kernel; the kernel
    rows of the weight gradient in two parts, each with one sum.
    """
    config = dict(config)
    height = triton.cdiv(p.height, p.dilation_h if p.stride == 1 else p.stride)
    if "CB" in config:  # on tensor cores
        return (
            config | {"CB": min(triton.next_power_of_2(p.channels), 64)} | ({"parts": 1} if "parts" in config else {})
        )
    if "V" in config:  # a line in two groups, the lines in two strips
        config["Q"] = min(config["Q"], max(1, triton.cdiv(dwconv_plan.line(p).width, 2)), 7)
        config["strip"] = max(config["strip"], triton.cdiv(dwconv_plan.line(p).height, 2))
        if "parts" in config:
            config |= {"parts": 1, "BC": min(triton.next_power_of_2(p.channels), 1024)}
        return config
    if "Q" in config:
        config["Q"] = min(config["Q"], 3 if p.few else 1)
    if "strip" in config:
        least = triton.cdiv(height, 2 if p.few else 1)
        config["strip"] = max(config["strip"], least)
    if "R" in config:
        config |= {
            "R": triton.cdiv(p.kernel_h, 2) if p.stride == 1 else 1,
            "parts": 1,
            "BC": min(triton.next_power_of_2(p.channels), 1024),
        }
    return config


def _problem(x: Tensor, call: Call, *images: Image) -> dwconv_plan.Problem:
    """For x, the input of the convolution or its gradient; `images`: what is read and written."""
    (depth, *image), (kernel_d, *kernel) = sides(x), sides(call.weight)
    toeplitz = x.dim() == 4 and not any(seen.channels_first for seen in images)
    toeplitz = toeplitz and dwconv_plan.on_tensor_cores(x.shape[1], call.dilation, call.stride, call.compute_dtype)
    return dwconv_plan.Problem(
        *x.shape[:2],
        *image,
        *kernel,
        *call.dilation,
        x.element_size(),
        call.stride,
        depth,
        kernel_d,
        toeplitz,
        vector=_vector(call, images),
    )


def _vector(call: Call, images: tuple[Image, ...]) -> int:
    """Channels that a thread of dwconv_lines.py has; 0 if its kernels cannot serve the call."""
    weight = call.weight
    if weight.dim() == 5 or any(image.channels_first for image in images):
        return 0
    dtype = images[0].tensor.dtype
    most = dwconv_plan.line_channels(weight.shape[0], weight.shape[2:], call.stride, dtype)
    even = call.compute_dtype == dtype and not exporting.traces_launches()  # there addresses are not known
    even = even and all(i.tensor.dtype == dtype and i.stride_n % 2 == 0 and aligned(i.tensor, 4) for i in images)
    return most if even else min(most, 1)


def packed_weight(weight: Tensor, round_to: tl.dtype | None) -> Tensor:
    """(C, 1, KH, KW) as (KH, KW, C) in fp32, rounded to `round_to` before."""
    channels, _, kernel_h, kernel_w = weight.shape
    packed = torch.empty(kernel_h, kernel_w, channels, dtype=torch.float32, device=weight.device)
    block = 4096 if device.interpreted() else 256
    strides = weight_strides(weight)
    config = {"BLOCK": block, "num_warps": 8, "enable_fp_fusion": True}
    launch(pack_kernel, (triton.cdiv(weight.numel(), block),))(
        weight, packed, C=channels, KH=kernel_h, KW=kernel_w, WEIGHT=strides, ROUND=round_to, **config
    )
    return packed


def _on_tensor_cores(
    source: Image,
    call: Call,
    bias: Tensor | None,
    added: Image | None,
    target: Image,
    gradient: bool,
    config: Mapping[str, Any],
) -> None:
    """What `convolve` does, with a plan of dwconv_toeplitz_plan.py."""
    x, weight, compute_dtype = source.tensor, call.weight, call.compute_dtype
    n, channels, height, width = x.shape
    kernel_h, kernel_w = weight.shape[2:]
    window = dwconv_toeplitz_plan.window(width, kernel_w)
    assert window is not None
    shared = {"C": channels, "KH": kernel_h, "LENGTH": window.length, "FIRST": window.first, "enable_fp_fusion": True}
    copies = torch.empty(channels, kernel_h + 1, 8, window.length, dtype=compute_dtype, device=x.device)
    block = 4096 if device.interpreted() else 1024
    launch(copies_kernel, (triton.cdiv(copies.numel(), block),))(
        weight, copies, WEIGHT=weight_strides(weight), KW=kernel_w, FLIP=gradient, BLOCK=block, num_warps=8, **shared
    )
    tile = {name: int(config[name]) for name in ("CB", "NB", "GB", "R")}
    row_blocks = triton.cdiv(height, tile["GB"] * tile["R"])
    grid = (
        triton.cdiv(channels, tile["CB"]),
        triton.cdiv(width, window.out) * row_blocks,
        triton.cdiv(n, tile["NB"]),
    )
    launch(toeplitz_kernel, grid)(
        x,
        copies,
        None if bias is None else flat(bias),
        None if added is None else added.tensor,
        target.tensor,
        n,
        source.stride_n,
        target.stride_n,
        0 if added is None else added.stride_n,
        height,
        width,
        ROUND=rounding(x.dtype, compute_dtype),
        WIN=window.inside,
        LEFT=window.left,
        BN=window.out,
        num_warps=int(config["warps"]),
        num_stages=2,
        **tile,
        **shared,
    )


def _line_options(problem: dwconv_plan.Problem, call: Call, tile: int, vector: int, source: Image) -> dict[str, Any]:
    """What the kernels of dwconv_lines.py have in common."""
    column = call.weight.shape[3] == 1
    stride_c, stride_h, stride_w = weight_strides(call.weight)
    return {
        "C": call.weight.shape[0],
        "K": max(call.weight.shape[2:]),
        "D": call.dilation[0 if column else 1],
        "COLUMN": column,
        "WEIGHT": (stride_c, stride_h if column else stride_w),
        "ROUND": rounding(source.tensor.dtype, call.compute_dtype),
        "V": vector,
        "Q": tile,
        "EDGES": dwconv_plan.edges(dwconv_plan.line(problem), tile),
        "enable_fp_fusion": True,
    }


def convolve(
    x: Tensor, call: Call, bias: Tensor | None, residual: Tensor | None, out: Tensor, gradient: bool
) -> Tensor:
    """Write the convolution of x (+ bias, + residual) into `out`, whatever its strides.

    gradient: x is the gradient of the call's result, `out` that of its input.
    """
    weight, dilation, stride, compute_dtype = call.weight, call.dilation, call.stride, call.compute_dtype
    larger = out if gradient else x
    n, channels = larger.shape[:2]
    depth, height, width = sides(larger)
    out_depth, out_height, out_width = sides(out)
    kernel_d, kernel_h, kernel_w = sides(weight)
    source = as_image(x)
    target = viewed(out) or as_image(torch.empty_like(out, memory_format=channels_last(out)))
    added = None if residual is None else as_image_like(residual, target)
    problem = _problem(larger, call, *(image for image in (source, target, added) if image is not None))
    if larger.dim() == 4 and dwconv_plan.two_channels(channels, stride, device.gpu().arch):
        problem = problem._replace(x2=all(image is None or in_twos(image) for image in (source, target, added)))
    plan = dwconv_plan.forward(problem, device.gpu())
    kernel, config = plan.name.partition("-")[0], plan.config
    if device.interpreted():
        many = kernel_h * height > (150 if problem.few else 300)
        if kernel == "rows" and stride == 1 and many and not problem.volume:
            kernel, config = "rolling", {"Q": config["Q"], "strip": 1}  # loads a row of x once, not per kernel row
        config = _interpretable(config, problem)
    if kernel == "toeplitz":
        _on_tensor_cores(source, call, bias, added, target, gradient, config)
        return filled(target, out)
    tile = dwconv_plan.columns(problem, config, gradient)
    if kernel == "lines":
        tile = int(config["Q"])
        vector = int(config["V"])
        lanes = n * (channels // vector) * triton.cdiv(dwconv_plan.line(problem).width, tile)
        block = _block(lanes)
        strips = triton.cdiv(dwconv_plan.line(problem).height, config["strip"])
        launch(lines_kernel, (triton.cdiv(lanes, block), strips))(
            source.tensor,
            weight,
            None if bias is None else flat(bias),
            None if added is None else added.tensor,
            target.tensor,
            n,
            source.stride_n,
            target.stride_n,
            0 if added is None else added.stride_n,
            height,
            width,
            config["strip"],
            FLIP=gradient,
            ROUND_WEIGHT=rounding(weight.dtype, compute_dtype),
            BLOCK=block,
            num_warps=max(1, min(8, block // device.lanes())),
            **_line_options(problem, call, tile, vector, source),
        )
        return filled(target, out)
    # With a stride all groups of columns of a gradient begin at even ones.
    between = tile - tile % stride if gradient and tile > 1 else tile
    x2 = bool(config.get("X2"))
    lanes = n * (channels // 2 if x2 else channels) * triton.cdiv(out_width - (tile - between), between)
    block = _block(lanes)
    round_weight = rounding(weight.dtype, compute_dtype)
    weight = as_rows(weight)
    strides = weight_strides(weight)
    packed = bool(config.get("pack"))
    if packed:
        weight, strides = packed_weight(weight, round_weight), (1, kernel_w * channels, channels)
    arguments = {
        "x_ptr": source.tensor,
        "weight_ptr": weight,
        "bias_ptr": None if bias is None else flat(bias),
        "residual_ptr": None if added is None else added.tensor,
        "y_ptr": target.tensor,
        "samples": n,
        "x_sn": source.stride_n,
        "y_sn": target.stride_n,
        "residual_sn": 0 if added is None else added.stride_n,
        "C": channels,
        "KH": kernel_h,
        "KW": kernel_w,
        "DH": dilation[0],
        "DW": dilation[1],
        "WEIGHT": strides,
        "FLIP": gradient,
        "ROUND": rounding(x.dtype, compute_dtype),
        "ROUND_WEIGHT": None if packed else round_weight,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // device.lanes())),
        "enable_fp_fusion": True,
    }
    programs = triton.cdiv(lanes, block)
    if kernel == "plane":  # height and width are part of the compiled kernel
        arguments |= {"X": source.strides, "Y": target.strides}
        arguments |= {"H": height, "W": width, "CHANNELS_FIRST": target.channels_first}
        launch(plane_kernel, (programs,))(**arguments, one=1)
    else:
        arguments |= {"X_FIRST": source.channels_first, "Y_FIRST": target.channels_first}
        arguments |= {"height": height, "width": width, "Q": tile, "EDGES": dwconv_plan.edges(problem, tile), "X2": x2}
        if kernel == "rolling":
            strip = config["strip"]
            strips = triton.cdiv(triton.cdiv(height, dilation[0]), strip)
            launch(rolling_kernel, (programs, strips * dilation[0]))(**arguments, strip=strip)
        else:
            pair = bool(config["pair"])
            pairs = triton.cdiv(triton.cdiv(height, dilation[0]), 2) * dilation[0]
            strides = (1, stride) if gradient else (stride, 1)
            arguments |= {"PAIR": pair, "DOWN": strides[0], "UP": strides[1]}
            arguments |= {"depth": depth if problem.volume else None, "KD": kernel_d}
            launch(rows_kernel, (programs, pairs if pair else out_height, out_depth))(**arguments)
    return filled(target, out)


@prepared
def forward(call: Call, out: Tensor | None = None) -> Tensor:
    """Convolve in `compute_dtype`, sums in fp32; the result is like x, or written to `out` in its dtype and strides."""
    if out is None:
        out = call.result()
    return convolve(call.x, call, call.bias, None, out, gradient=False)


def input_gradient(dy: Tensor, call: Call, residual: Tensor | None = None) -> Tensor:
    """Return dx = dy (*) flipped weight [+ residual], like x; with a residual in its dtype."""
    dx = torch.empty_like(call.x, dtype=None if residual is None else residual.dtype)
    return convolve(dy, call, None, residual, dx, gradient=True)


def _sums(parts: int, call: Call, deterministic: bool) -> Tensor:
    """Partial sums (parts, taps + 1, C); a single slot of zeros if programs add atomically."""
    weight = call.weight
    taps, channels = weight[0].numel(), weight.shape[0]
    if deterministic:
        return torch.empty(parts, taps + 1, channels, dtype=torch.float32, device=weight.device)
    return torch.zeros(1, taps + 1, channels, dtype=torch.float32, device=weight.device)


def _partials(
    gradient: Image,
    image: Image,
    call: Call,
    config: Mapping[str, Any],
    problem: dwconv_plan.Problem,
    deterministic: bool,
) -> Tensor:
    """Partial sums of the weight gradient and, last, of the bias gradient."""
    dy, x, dilation, stride = gradient.tensor, image.tensor, call.dilation, call.stride
    n, channels = x.shape[:2]
    depth, height, width = sides(x)
    out_depth, out_height, out_width = sides(dy)
    kernel_d, kernel_h, kernel_w = sides(call.weight)
    tile, kernel_rows, strip, parts, block_c = (int(config[name]) for name in ("Q", "R", "strip", "parts", "BC"))
    block = 128
    if device.interpreted():  # as few programs as the strips allow
        positions = n * out_depth * triton.cdiv(out_width, tile)
        block = block_c * min(triton.next_power_of_2(positions), 4096 // block_c)
    lattices = dilation[0] if stride == 1 else 1
    strips = triton.cdiv(triton.cdiv(out_height, lattices), strip) * lattices
    partials = _sums(strips * parts, call, deterministic)
    kernel_blocks = kernel_d * triton.cdiv(kernel_h, kernel_rows)
    launch(partials_kernel, (triton.cdiv(channels, block_c) * parts, strips, kernel_blocks))(
        dy,
        x,
        partials,
        n,
        gradient.stride_n,
        image.stride_n,
        depth if problem.volume else None,
        height,
        width,
        parts,
        strip,
        C=channels,
        KD=kernel_d,
        KH=kernel_h,
        KW=kernel_w,
        DH=dilation[0],
        DW=dilation[1],
        DY_FIRST=gradient.channels_first,
        X_FIRST=image.channels_first,
        ROUND_DY=rounding(dy.dtype, call.compute_dtype),
        ROUND=rounding(x.dtype, call.compute_dtype),
        ATOMIC=not deterministic,
        Q=tile,
        EDGES=dwconv_plan.edges(problem, tile),
        R=kernel_rows,
        STRIDE=stride,
        BC=block_c,
        BLOCK=block,
        num_warps=max(1, min(4, block // device.lanes())),
        enable_fp_fusion=True,
    )
    return partials


def _line_partials(
    gradient: Image,
    image: Image,
    call: Call,
    config: Mapping[str, Any],
    problem: dwconv_plan.Problem,
    deterministic: bool,
) -> Tensor:
    """What `_partials` does, for a kernel of one row or one column."""
    dy, x = gradient.tensor, image.tensor
    n, channels, height, width = x.shape
    line = dwconv_plan.line(problem)
    tile, strip, parts, block_c = (int(config[name]) for name in ("Q", "strip", "parts", "BC"))
    vector = int(config["V"])
    block = 128
    if device.interpreted():  # as few programs as the strips allow
        positions = n * triton.cdiv(line.width, tile)
        block = block_c * min(triton.next_power_of_2(positions), 4096 // block_c)
    strips = triton.cdiv(line.height, strip)
    partials = _sums(strips * parts, call, deterministic)
    options = _line_options(problem, call, tile, vector, image)
    del options["WEIGHT"]
    launch(line_partials_kernel, (triton.cdiv(channels, vector * block_c) * parts, strips))(
        dy,
        x,
        partials,
        n,
        gradient.stride_n,
        image.stride_n,
        height,
        width,
        parts,
        strip,
        ROUND_DY=rounding(dy.dtype, call.compute_dtype),
        ATOMIC=not deterministic,
        BC=block_c,
        BLOCK=block,
        num_warps=max(1, min(4, block // device.lanes())),
        **options,
    )
    return partials


def _partials_on_tensor_cores(
    gradient: Image, image: Image, call: Call, config: Mapping[str, Any], deterministic: bool
) -> Tensor:
    """What `_partials` does, with a plan of dwconv_toeplitz_plan.py."""
    dy, x = gradient.tensor, image.tensor
    n, channels, height, width = x.shape
    kernel_h, kernel_w = call.weight.shape[2:]
    window = dwconv_toeplitz_plan.window(width, kernel_w)
    assert window is not None
    tile = {name: int(config[name]) for name in ("CB", "NB", "GB", "R", "KB")}
    parts = int(config["parts"])
    partials = _sums(parts, call, deterministic)
    launch(toeplitz_partials_kernel, (triton.cdiv(channels, tile["CB"]), triton.cdiv(kernel_h, tile["KB"]), parts))(
        dy,
        x,
        partials,
        n,
        gradient.stride_n,
        image.stride_n,
        height,
        width,
        parts,
        C=channels,
        KH=kernel_h,
        KW=kernel_w,
        ROUND_DY=rounding(dy.dtype, call.compute_dtype),
        ROUND=rounding(x.dtype, call.compute_dtype),
        ATOMIC=not deterministic,
        WIN=window.inside,
        LEFT=window.left,
        BN=window.out,
        TAPS=triton.next_power_of_2(kernel_w),
        num_warps=int(config["warps"]),
        num_stages=1,
        enable_fp_fusion=True,
        **tile,
    )
    return partials


def parameter_gradients(
    dy: Tensor, call: Call, needs_weight: bool, needs_bias: bool, deterministic: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dw, db) like weight and bias, None for a gradient that is not needed.

    Bitwise the same every time: programs write partial sums, which a second kernel adds in a fixed order. With
    `deterministic=False` they are added atomically, which saves their memory: 4 (taps + 1) C bytes for each of at
    most a few hundred parts.
    """
    x, weight, bias = call[:3]
    channels, (kernel_d, kernel_h, kernel_w) = x.shape[1], sides(weight)
    dw = torch.empty_like(weight) if needs_weight else None
    written = weight if dw is None else dw
    if written is dw and weight.dim() == 5 and not weight.is_contiguous():  # its planes may not be rows of one another
        written = torch.empty_like(weight, memory_format=torch.contiguous_format)
    db = torch.empty_like(bias) if needs_bias else None
    gradient, image = as_image(dy), as_image(x)
    problem = _problem(x, call, gradient, image)
    config = dwconv_plan.weight(problem, device.gpu()).config
    if device.interpreted():
        config = _interpretable(config, problem)
    if "KB" in config:
        partials = _partials_on_tensor_cores(gradient, image, call, config, deterministic)
    elif "V" in config:
        partials = _line_partials(gradient, image, call, config, problem, deterministic)
    else:
        partials = _partials(gradient, image, call, config, problem, deterministic)
    # Wide programs take half the instructions, but there must be enough of them.
    block_l = 4096 if device.interpreted() else 256 if partials[0].numel() >= 2**15 else 64
    rows = as_rows(written)
    launch(finish_kernel, (triton.cdiv(partials[0].numel(), block_l),))(
        partials,
        None if dw is None else rows,
        db,
        len(partials),
        C=channels,
        KH=kernel_d * kernel_h,
        KW=kernel_w,
        DW=weight_strides(rows),
        BLOCK_P=8,
        BLOCK_L=block_l,
        num_warps=4,
        enable_fp_fusion=True,
    )
    if dw is not None and written is not dw:
        dw.copy_(written)
    return dw, db


@prepared
def backward(dy: Tensor, call: Call, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of (x, weight, bias) that `needs` marks, in that order."""
    dx = dw = db = None
    if needs[0]:
        dx = input_gradient(dy, call)
    if needs[1] or needs[2]:
        dw, db = parameter_gradients(dy, call, needs[1], needs[2])
    return [gradient for gradient in (dx, dw, db) if gradient is not None]
