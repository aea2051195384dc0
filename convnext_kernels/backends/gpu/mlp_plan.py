"""What both GPU backends choose the plan of the inverted bottleneck by, and the predicted cost of mlp_cublas.py."""

from typing import NamedTuple

import torch

from convnext_kernels import tuning
from convnext_kernels.calls import MlpCall
from convnext_kernels.torch_versions import tf32_allowed
from convnext_kernels.tuning import Candidate, Work
from convnext_kernels.tuning.cost import cublas_product

# Of a plan, once for each plan with fewer launches: in their order fused, (Triton:) gemm, cublas.
HANDICAP = 1.5
GELU_OPS = 16  # fp32 instructions per element, including bias, conversion and store


class Problem(NamedTuple):
    """Everything that the choice depends on."""

    samples: int
    sample_pixels: int
    channels: int
    hidden: int
    grn: bool
    dtype: str  # of x: "bfloat16"
    compute_dtype: str  # of the matmuls
    keeps_hidden: bool
    tf32: bool  # fp32 matmuls may run as TF32
    stream: str = ""  # dtype of the residual, the result and its gradient, if it is not x's
    adaptive: bool = False  # whether each sample has a weight and a bias of LayerNorm

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.dtype == "float32" else 2

    @property
    def stream_itemsize(self) -> int:
        """Bytes of an element of the residual, the result and its gradient."""
        return 4 if (self.stream or self.dtype) == "float32" else 2

    @property
    def pixels(self) -> int:
        """Of all samples."""
        return self.samples * self.sample_pixels

    @property
    def compute_itemsize(self) -> int:
        """Bytes of an element of the hidden and the weights."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def rounded(self) -> bool:
        """Whether fp32 matmuls are rounded to TF32, so that tensor cores compute them."""
        return self.tf32 and self.compute_itemsize == 4

    def tiles(self, bm: int) -> int:
        """Tiles of `bm` pixels; with GRN or an adaptive norm a tile lies within one sample."""
        if self.grn or self.adaptive:
            return self.samples * -(-self.sample_pixels // bm)
        return -(-self.pixels // bm)


def problem_of(call: MlpCall, keeps_hidden: bool, stream: torch.dtype) -> Problem:
    """The problem of a call; `stream`: the dtype of the residual and the result."""
    samples, channels, height, width = call.x.shape
    return Problem(
        samples,
        height * width,
        channels,
        call.p.pwconv1_weight.shape[0],
        call.p.grn_weight is not None,
        *(str(dtype).removeprefix("torch.") for dtype in (call.x.dtype, call.compute_dtype)),
        keeps_hidden,
        call.compute_dtype == torch.float32 and tf32_allowed(),
        str(stream).removeprefix("torch."),
        call.p.adaptive,
    )


def response_work(p: Problem, tiles: int) -> Work:
    """V2's response from the sums of `tiles` tiles."""
    return Work(dram_bytes=4.0 * p.hidden * (tiles + p.samples), programs=p.samples)


def pointwise(p: Problem, bytes_per_pixel: float) -> Work:
    """A launch that only moves bytes."""
    return Work(
        dram_bytes=p.pixels * bytes_per_pixel,
        l2_bytes=p.pixels * bytes_per_pixel,
        programs=max(1, int(p.pixels * bytes_per_pixel) // 8192),
        ctas_per_sm=8,
    )


def product_by_library(p: Problem, inner: int, outer: int, gpu: tuning.Gpu) -> Work:
    """(pixels, inner) x (inner, outer) by cuBLAS."""
    return cublas_product(p.pixels, inner, outer, p.compute_itemsize, gpu, p.tf32)


def library_expand(p: Problem, gpu: tuning.Gpu) -> list[Work]:
    """The hidden by cuBLAS: norm, product, activation."""
    element, hidden = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    return [
        pointwise(p, element + p.channels * p.compute_itemsize),
        product_by_library(p, p.channels, p.hidden, gpu),
        pointwise(p, 2 * hidden),
    ]


def library_project(p: Problem, gpu: tuning.Gpu) -> list[Work]:
    """The result from the hidden by cuBLAS: product, residual."""
    return [
        product_by_library(p, p.hidden, p.channels, gpu),
        pointwise(p, p.channels * (2 * p.stream_itemsize + p.compute_itemsize)),
    ]


def cublas(p: Problem, gpu: tuning.Gpu, handicap: float) -> Candidate:
    """The plan of `mlp_cublas.forward`."""
    steps, hidden = library_expand(p, gpu), p.hidden * p.compute_itemsize
    if p.grn:
        steps += [pointwise(p, hidden), response_work(p, p.samples), pointwise(p, 2 * hidden)]
    return Candidate("cublas", {"plan": "cublas"}, (*steps, *library_project(p, gpu)), handicap)
