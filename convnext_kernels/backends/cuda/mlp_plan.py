"""The plan of the inverted bottleneck and the pixels of a thread block: the candidates and their predicted costs."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from convnext_kernels import tuning
from convnext_kernels.backends.cuda import native
from convnext_kernels.tuning import Candidate, Work
from convnext_kernels.tuning.cost import cublas_product

FUSED_CHANNELS = 256  # the accumulators of more channels do not fit the registers
CHUNK = 32  # hidden units are padded to a multiple of this
WARPS = (8, 4, 2)  # of a block
WARPS_FP32 = (8, 4, 2, 1)  # for the fp32 kernel, which has its pixels in shared memory
REGISTER_WARPS = 8  # of kernels with up to 255 registers that fit a multiprocessor
# The share of the tensor cores' peak that mma.sync reaches in such kernels: since Hopper its peak is below those of
# wgmma and tcgen05. Above 128 channels a warp has half as many pixels, so it reads weights from shared memory twice as
# often.
MMA_SHARE = {90: 0.38, 100: 0.18, 103: 0.18}
MMA_SHARE_BEFORE = 0.6
WIDE_SHARE = 0.75
FMA_SHARE = 0.5  # of the peak, reached by the fp32 kernel: every product reads its operands from shared memory
HANDICAP = 1.5  # of the cublas plan, which has more launches, against the tensor core kernel; none against fp32
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

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.dtype == "float32" else 2

    @property
    def pixels(self) -> int:
        """Of all samples."""
        return self.samples * self.sample_pixels

    @property
    def compute_itemsize(self) -> int:
        """Bytes of an element of the hidden and the weights."""
        return 4 if self.compute_dtype == "float32" else 2

    def tiles(self, size: int) -> int:
        """Tiles of `size` pixels; with GRN a tile lies within one sample."""
        if self.grn:
            return self.samples * -(-self.sample_pixels // size)
        return -(-self.pixels // size)


def gpu_of(x: Tensor) -> tuning.Gpu:
    """The data sheet of x's GPU."""
    return _gpu(native.info(x)["arch"], native.index(x))


@functools.cache
def _gpu(arch: int, index: int | None) -> tuning.Gpu:
    return tuning.for_device("" if index is None else torch.cuda.get_device_name(index), arch)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _response_work(p: Problem, tiles: int) -> Work:
    return Work(dram_bytes=4.0 * p.hidden * (tiles + p.samples), programs=p.samples)


def _passes(p: Problem, tiles: int, work: Callable[[int, bool, bool], Work]) -> tuple[Work, ...]:
    """The launches of the fused plan, each ``work(matmuls, whole, keeps_hidden)``: GRN needs its sums first."""
    if not p.grn:
        return (work(2, True, p.keeps_hidden),)
    return work(1, False, p.keeps_hidden), _response_work(p, tiles), work(2, True, False)


def _moved(p: Problem, whole: bool, keeps_hidden: bool) -> float:
    """Bytes of pixels that a launch reads and writes: x, and if it is `whole` also the residual and the output."""
    return p.pixels * (p.channels * p.itemsize * (3 if whole else 1) + p.hidden * p.compute_itemsize * keeps_hidden)


def _fused(p: Problem, gpu: tuning.Gpu, warps: int) -> Candidate:
    narrow = p.channels <= 128
    tile = warps * (32 if narrow else 16)
    tiles = p.tiles(tile)
    padded = tiles * tile
    macs = padded * _round_up(p.channels, 32) * _round_up(p.hidden, CHUNK)  # of one product
    weights = p.channels * p.hidden * 2.0
    share = MMA_SHARE.get(gpu.arch, MMA_SHARE_BEFORE) * (1.0 if narrow else WIDE_SHARE)

    def work(products: int, whole: bool, keeps_hidden: bool) -> Work:
        moved = _moved(p, whole, keeps_hidden)
        return Work(
            dram_bytes=moved + weights * products,
            l2_bytes=moved + tiles * weights * products,
            tensor_flops=2.0 * macs * products / share,
            fp32_ops=padded * p.hidden * GELU_OPS,
            programs=tiles,
            ctas_per_sm=REGISTER_WARPS // warps,
            warps=warps,
        )

    return Candidate(f"fused-{tile}", {"plan": "fused", "tile": tile}, _passes(p, tiles, work))


def _fused_fp32(p: Problem, gpu: tuning.Gpu, warps: int) -> Candidate | None:
    tile = warps * 16
    tiles = p.tiles(tile)
    padded = tiles * tile
    columns = next(c for c in (64, 96, 128, 192, 256) if p.channels <= c)
    chunk = 32 if columns <= 128 else 16
    shared = 4 * (4 * columns + 22 * chunk + chunk * (columns + 4) + columns * (chunk + 4))
    shared += warps * 64 * (columns + chunk + 8)
    if shared > gpu.shared_bytes:
        return None
    fits = max(1, min(gpu.shared_sm_bytes // (shared + 1024), (16 if columns <= 96 else REGISTER_WARPS) // warps))
    macs = padded * columns * _round_up(p.hidden, chunk)
    weights = p.channels * p.hidden * 4.0

    def work(products: int, whole: bool, keeps_hidden: bool) -> Work:
        moved = _moved(p, whole, keeps_hidden)
        return Work(
            dram_bytes=moved + weights * products,
            l2_bytes=moved + tiles * weights * products,
            fp32_ops=macs * products / FMA_SHARE + padded * p.hidden * GELU_OPS,
            programs=tiles,
            ctas_per_sm=fits,
            warps=warps,
        )

    return Candidate(f"fused-{tile}", {"plan": "fused", "tile": tile}, _passes(p, tiles, work))


def _pointwise(p: Problem, bytes_per_pixel: float) -> Work:
    return Work(
        dram_bytes=p.pixels * bytes_per_pixel,
        l2_bytes=p.pixels * bytes_per_pixel,
        programs=max(1, int(p.pixels * bytes_per_pixel) // 8192),
        ctas_per_sm=8,
    )


def _cublas(p: Problem, gpu: tuning.Gpu, handicap: float) -> Candidate:
    def product(inner: int, outer: int) -> Work:
        return cublas_product(p.pixels, inner, outer, p.compute_itemsize, gpu, p.tf32)

    rows, element, hidden = p.channels * p.compute_itemsize, p.channels * p.itemsize, p.hidden * p.compute_itemsize
    steps = [_pointwise(p, element + rows), product(p.channels, p.hidden), _pointwise(p, 2 * hidden)]
    if p.grn:
        steps += [_pointwise(p, hidden), _response_work(p, p.samples), _pointwise(p, 2 * hidden)]
    steps += [product(p.hidden, p.channels), _pointwise(p, 2 * element + rows)]
    return Candidate("cublas", {"plan": "cublas"}, tuple(steps), handicap)


def forward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the forward pass."""
    found = []
    if p.channels <= FUSED_CHANNELS:
        if p.compute_dtype == "float32":
            found = [] if p.tf32 else [_fused_fp32(p, gpu, warps) for warps in WARPS_FP32]
        # The kernel takes pixels in fp32 or in the dtype of the matmuls; Turing's tensor cores have no bf16.
        elif p.dtype in ("float32", p.compute_dtype) and (p.compute_dtype == "float16" or gpu.arch >= 80):
            found = [_fused(p, gpu, warps) for warps in WARPS]
    found = [candidate for candidate in found if candidate is not None]
    yield from found
    yield _cublas(p, gpu, HANDICAP if found and p.compute_itemsize == 2 else 1.0)


@tuning.remembered
def forward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the forward pass runs."""
    return tuning.pick("cuda_mlp_forward", p, tuple(forward_candidates(p, gpu)), gpu)
