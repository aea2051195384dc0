"""The ConvNeXt block: backends/gpu/block.py with this backend's dwconv and mlp, or one kernel (block_fused.py)."""

import functools

import torch
import triton
from torch import Tensor

from convnext_kernels.backends.gpu import block, mlp_cublas
from convnext_kernels.backends.gpu.layout import flat, vector
from convnext_kernels.backends.triton import device, dwconv, mlp
from convnext_kernels.backends.triton.kernels.block_fused import block_fwd_kernel
from convnext_kernels.backends.triton.launch import launch, prepared
from convnext_kernels.backends.triton.plans import block_plan
from convnext_kernels.calls import BlockCall

KEEPS_HIDDEN = True
KEEPS_ROUNDED = True


def _whole_tile(call: BlockCall) -> dict | None:
    """The configuration of `block_fwd_kernel` if it serves the call and is chosen."""
    x, p, (height, width) = call.x, call.p, call.weight.shape[-2:]
    served = (
        x.dtype == call.weight.dtype == call.compute_dtype
        and x.element_size() == 2
        and x.shape[1] <= block_plan.CHANNELS
        and height == width <= block_plan.SIDE
        and call.dilation == (1, 1)
        and p.grn_weight is None
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    if not served:
        return None
    samples, channels, *size = x.shape
    dtype = str(x.dtype).removeprefix("torch.")
    problem = block_plan.Problem(samples, channels, *size, p.pwconv1_weight.shape[0], width, dtype)
    return block_plan.plan(problem, device.gpu()).config.get("tile")


def _forward(call: BlockCall, *kept: Tensor) -> Tensor:
    tile = None if kept else _whole_tile(call)
    if tile is None:
        return block.forward(dwconv, mlp, call, *kept)
    x, p = call.x, call.p
    samples, channels, height, width = x.shape
    w1, w2 = mlp_cublas.matrices(call)
    out = torch.empty_like(x)
    tiles = triton.cdiv(height * width, tile["BM"])
    convolution = x, dwconv.packed_weight(call.weight, None), vector(call.bias)
    first = flat(p.norm_weight), vector(p.norm_bias), w1, vector(p.pwconv1_bias)
    second = w2, vector(p.pwconv2_bias), vector(p.gamma), vector(call.drop_scale)
    options = {"C": channels, "HIDDEN": w1.shape[0], "K": call.weight.shape[-1], "NORM": call.norm}
    options |= {"ADAPTIVE": p.adaptive, "ACTIVATION": call.activation, "enable_fp_fusion": True}
    launch(block_fwd_kernel, (samples * tiles,))(
        *convolution, *first, *second, out, height, width, tiles, call.eps, **options, **tile
    )
    return out


forward = prepared(_forward)
sequence = prepared(functools.partial(block.sequence, _forward))
backward = prepared(functools.partial(block.backward, dwconv, mlp))
