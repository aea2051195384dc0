"""The plan of the inverted bottleneck and the pixels of a thread block: the candidates and their predicted costs."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from convnext_kernels import tuning
from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.gpu.mlp_plan import GELU_OPS, HANDICAP, Problem, cublas, response_work
from convnext_kernels.tuning import Candidate, Work

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


def gpu_of(x: Tensor) -> tuning.Gpu:
    """The data sheet of x's GPU."""
    return _gpu(native.info(x)["arch"], native.index(x))


@functools.cache
def _gpu(arch: int, index: int | None) -> tuning.Gpu:
    return tuning.for_device("" if index is None else torch.cuda.get_device_name(index), arch)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _fused(p: Problem, warps: int, tile: int, resident: int, macs: float, tensor_share: float = 0.0) -> Candidate:
    """One kernel, `macs` multiply-adds in each product, on tensor cores (of whose peak it reaches the share) or not.

    GRN needs its sums first: then the kernel runs twice, the first time without the second product.
    """
    tiles = p.tiles(tile)
    weights = p.channels * p.hidden * float(p.compute_itemsize)

    def work(products: int, whole: bool, keeps_hidden: bool) -> Work:
        # x, and if it is `whole` also the residual and the output
        moved = p.channels * p.itemsize * (3 if whole else 1) + p.hidden * p.compute_itemsize * keeps_hidden
        moved *= p.pixels
        return Work(
            dram_bytes=moved + weights * products,
            l2_bytes=moved + tiles * weights * products,
            tensor_flops=2.0 * macs * products / tensor_share if tensor_share else 0.0,
            fp32_ops=(0 if tensor_share else macs * products / FMA_SHARE) + tiles * tile * p.hidden * GELU_OPS,
            programs=tiles,
            ctas_per_sm=resident,
            warps=warps,
        )

    launches = (work(2, True, p.keeps_hidden),)
    if p.grn:
        launches = work(1, False, p.keeps_hidden), response_work(p, tiles), work(2, True, False)
    return Candidate(f"fused-{tile}", {"plan": "fused", "tile": tile}, launches)


def _on_tensor_cores(p: Problem, gpu: tuning.Gpu, warps: int) -> Candidate:
    narrow = p.channels <= 128
    tile = warps * (32 if narrow else 16)
    macs = p.tiles(tile) * tile * _round_up(p.channels, 32) * _round_up(p.hidden, CHUNK)
    share = MMA_SHARE.get(gpu.arch, MMA_SHARE_BEFORE) * (1.0 if narrow else WIDE_SHARE)
    return _fused(p, warps, tile, REGISTER_WARPS // warps, macs, share)


def _in_fp32(p: Problem, gpu: tuning.Gpu, warps: int) -> Candidate | None:
    tile = warps * 16
    columns = next(c for c in (64, 96, 128, 192, 256) if p.channels <= c)
    chunk = 32 if columns <= 128 else 16
    shared = 4 * (4 * columns + 22 * chunk + chunk * (columns + 4) + columns * (chunk + 4))
    shared += warps * 64 * (columns + chunk + 8)
    if shared > gpu.shared_bytes:
        return None
    fits = max(1, min(gpu.shared_sm_bytes // (shared + 1024), (16 if columns <= 96 else REGISTER_WARPS) // warps))
    return _fused(p, warps, tile, fits, p.tiles(tile) * tile * columns * _round_up(p.hidden, chunk))


def forward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the forward pass."""
    found = []
    if p.channels <= FUSED_CHANNELS:
        if p.compute_dtype == "float32":
            found = [] if p.tf32 else [_in_fp32(p, gpu, warps) for warps in WARPS_FP32]
        # The kernel takes pixels in fp32 or in the dtype of the matmuls; Turing's tensor cores have no bf16.
        elif p.dtype in ("float32", p.compute_dtype) and (p.compute_dtype == "float16" or gpu.arch >= 80):
            found = [_on_tensor_cores(p, gpu, warps) for warps in WARPS]
    found = [candidate for candidate in found if candidate is not None]
    yield from found
    # none against fp32
    yield cublas(p, gpu, HANDICAP if found and p.compute_itemsize == 2 else 1.0)


@tuning.remembered
def forward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the forward pass runs."""
    return tuning.pick("cuda_mlp_forward", p, tuple(forward_candidates(p, gpu)), gpu)
