"""What the plans of a depthwise convolution are chosen by, and what its launchers have in common."""

from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor

from convnext_kernels import exporting
from convnext_kernels.backends.gpu.prepared import aligned
from convnext_kernels.backends.triton import device
from convnext_kernels.backends.triton.dwconv_images import Image, sides, weight_strides
from convnext_kernels.backends.triton.plans import dwconv_plan
from convnext_kernels.calls import Dwconv3dCall, DwconvCall

Call = DwconvCall | Dwconv3dCall


def block_options(lanes: int) -> dict[str, Any]:
    """The lanes of a program, of so many in all, and its warps."""
    block = dwconv_plan.BLOCK
    if device.interpreted():  # its time grows with the number of programs, not of lanes
        block = max(block, min(4096, triton.next_power_of_2(lanes)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // device.lanes())), "enable_fp_fusion": True}


def programs_of(lanes: int, options: dict[str, Any]) -> int:
    """How many programs have the lanes."""
    return triton.cdiv(lanes, options["BLOCK"])


def interpretable(config: Mapping[str, Any], p: dwconv_plan.Problem) -> dict[str, Any]:
    """The plan, changed for the interpreter, whose time grows with programs and unrolled code, not with lanes.

    Few columns; two strips if there are strips (enough for a border between them), one for a large kernel; the kernel
    rows of the weight gradient in two parts, each with one sum.
    """
    config = dict(config)
    height = triton.cdiv(p.height, p.dilation_h if p.stride == 1 else p.stride)
    if "parts" in config:
        config["parts"] = 1
    if "CB" in config:  # on tensor cores
        return config | {"CB": min(triton.next_power_of_2(p.channels), 64)}
    if "BC" in config:
        config["BC"] = min(triton.next_power_of_2(p.channels), 1024)
    if "V" in config:  # a line in two groups, the lines in two strips
        config["Q"] = min(config["Q"], max(1, triton.cdiv(dwconv_plan.line(p).width, 2)), 7)
        config["strip"] = max(config["strip"], triton.cdiv(dwconv_plan.line(p).height, 2))
        return config
    if "Q" in config:
        config["Q"] = min(config["Q"], 3 if p.few else 1)
    if "strip" in config:
        least = triton.cdiv(height, 2 if p.few else 1)
        config["strip"] = max(config["strip"], least)
    if "R" in config:
        config["R"] = triton.cdiv(p.kernel_h, 2) if p.stride == 1 else 1
    return config


def problem_of(x: Tensor, call: Call, *images: Image) -> dwconv_plan.Problem:
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


def line_options(problem: dwconv_plan.Problem, call: Call, tile: int, vector: int) -> dict[str, Any]:
    """What the kernels of dwconv_lines.py have in common."""
    column = call.weight.shape[3] == 1
    stride_c, stride_h, stride_w = weight_strides(call.weight)
    return {
        "C": call.weight.shape[0],
        "K": max(call.weight.shape[2:]),
        "D": call.dilation[0 if column else 1],
        "COLUMN": column,
        "WEIGHT": (stride_c, stride_h if column else stride_w),
        "V": vector,
        "Q": tile,
        "EDGES": dwconv_plan.edges(dwconv_plan.line(problem), tile),
        "enable_fp_fusion": True,
    }
