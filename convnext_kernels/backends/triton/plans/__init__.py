"""The launches of each op for a problem, for `convnext-kernels plan`. Nothing runs; neither Triton nor a GPU is needed.

dwconv, mlp and block have plans (`dwconv_plan`, `mlp_plan`, `block_plan`), which the launchers follow. The other ops
launch the same kernels for every problem; their launches are listed here.
"""

import torch

from convnext_kernels.backends.triton.plans import block_plan, dwconv_plan, mlp_gradient_plan, mlp_plan
from convnext_kernels.tuning import Candidate, Gpu, Work, cublas_product

Steps = list[tuple[str, Candidate]]
Shape = tuple[int, int, int, int]


def _pointwise(*sizes: float) -> tuple[Work, ...]:
    """Launches that only move bytes."""
    return tuple(Work(dram_bytes=b, l2_bytes=b, programs=max(1, int(b) // 8192), ctas_per_sm=8) for b in sizes)


def dwconv(
    shape: Shape,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    stride: int,
    dtype: torch.dtype,
    training: bool,
    gpu: Gpu,
) -> Steps:
    """Depthwise convolution of (N, C, H, W) with a kernel of height x width."""
    toeplitz = dwconv_plan.on_tensor_cores(shape[1], dilation, stride, dtype)
    x2 = dwconv_plan.two_channels(shape[1], stride, gpu.arch)
    vector = dwconv_plan.line_channels(shape[1], kernel, stride, dtype)
    sizes = (*shape, *kernel, *dilation, dtype.itemsize, stride)
    problem = dwconv_plan.Problem(*sizes, toeplitz=toeplitz, x2=x2, vector=vector)
    steps = [("dwconv", dwconv_plan.forward(problem, gpu))]
    if training:
        steps.append(("dwconv dgrad", dwconv_plan.forward(problem, gpu)))
        steps.append(("dwconv wgrad", dwconv_plan.weight(problem, gpu)))
    return steps


def mlp(
    shape: Shape, hidden: int, grn: bool, dtype: torch.dtype, training: bool, keeps_hidden: bool, gpu: Gpu
) -> Steps:
    """Inverted bottleneck of (N, C, H, W) with `hidden` hidden channels."""
    n, c, h, w = shape
    name = str(dtype).removeprefix("torch.")
    problem = mlp_plan.Problem(n, h * w, c, hidden, grn, name, name, training and keeps_hidden, False)
    steps = [("mlp", mlp_plan.forward_plan(problem, gpu))]
    if training:
        steps.append(("mlp backward", mlp_gradient_plan.backward_plan(problem, gpu)))
    return steps


def whole_block(shape: Shape, hidden: int, kernel: tuple[int, int], dtype: torch.dtype, gpu: Gpu) -> Steps:
    """One kernel for the block of (N, C, H, W), V1 without dilation, in inference; nothing where it is not chosen."""
    n, c, h, w = shape
    if dtype.itemsize != 2 or c > block_plan.CHANNELS or kernel[0] != kernel[1] or kernel[0] > block_plan.SIDE:
        return []
    name = str(dtype).removeprefix("torch.")
    plan = block_plan.plan(block_plan.Problem(n, c, h, w, hidden, kernel[0], name), gpu)
    return [("block", plan)] if "tile" in plan.config else []


def layernorm(shape: Shape, dtype: torch.dtype, training: bool) -> Steps:
    """LayerNorm over the channels: one launch; in training one more for the gradient and one for its sums."""
    n, c, h, w = shape
    size = n * c * h * w * dtype.itemsize
    return [("layernorm", Candidate("layernorm", {}, _pointwise(2 * size, *((3 * size, 0) if training else ()))))]


def grn(shape: Shape, dtype: torch.dtype, training: bool) -> Steps:
    """Global response normalisation. Forward: squares, response, result. Backward: sums, response, dx, parameters."""
    n, c, h, w = shape
    size = n * c * h * w * dtype.itemsize
    backward = (2 * size, 0, 3 * size, 0) if training else ()
    return [("grn", Candidate("grn", {}, _pointwise(size, 0, 2 * size, *backward)))]


def downsample(shape: Shape, out: int, side: int, dtype: torch.dtype, training: bool, gpu: Gpu) -> Steps:
    """LayerNorm that writes patches of side x side pixels, then a matmul by cuBLAS to `out` channels."""
    n, c, h, w = shape
    patches, inner = n * (h // side) * (w // side), c * side * side
    size = n * c * h * w * dtype.itemsize
    launches = (*_pointwise(2 * size), cublas_product(patches, inner, out, dtype.itemsize, gpu))
    if training:  # patches again, dgrad and wgrad, the bias, LayerNorm's gradient and its sums
        launches += (
            *_pointwise(2 * size),
            cublas_product(patches, out, inner, dtype.itemsize, gpu),
            cublas_product(out, patches, inner, dtype.itemsize, gpu),
            *_pointwise(patches * out * dtype.itemsize, 3 * size, 0),
        )
    return [("layernorm, matmul", Candidate("cublas", {}, launches))]
