"""The choice between dwconv and mlp one after the other, and one kernel for the whole block in inference."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from convnext_kernels import tuning
from convnext_kernels.backends.triton.plans import dwconv_plan, mlp_plan
from convnext_kernels.tuning import Candidate, Work

SEPARATE = "separate"
CHANNELS = 96  # more accumulators spill beside a tile of the convolution
SIDE = 7  # of the largest kernel: a tap costs a load
# Instructions of one channel of one pixel: for each tap and for norm and residual, as the kernel's PTX executes them.
TAP_OPS, CHANNEL_OPS = 4, 50
# A program convolves and multiplies one after the other; that both run at the same time, as the model has it, takes
# several programs.
HANDICAP = 1.3


class Problem(NamedTuple):
    """Everything that the choice depends on."""

    samples: int
    channels: int
    height: int
    width: int
    hidden: int
    side: int  # of the depthwise kernel
    dtype: str


def _separate(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The two ops, whose kernels are choices of their own."""
    shape = p.samples, p.channels, p.height, p.width
    toeplitz = dwconv_plan.on_tensor_cores(p.channels, (1, 1), 1, getattr(torch, p.dtype))
    convolution = dwconv_plan.Problem(*shape, p.side, p.side, 1, 1, 2, toeplitz=toeplitz)
    bottleneck = mlp_plan.Problem(
        p.samples, p.height * p.width, p.channels, p.hidden, False, p.dtype, p.dtype, False, False
    )
    parts = (
        tuning.predicted(tuple(dwconv_plan.forward_candidates(convolution, gpu)), gpu),
        tuning.predicted(tuple(mlp_plan.forward_candidates(bottleneck, gpu)), gpu),
    )
    return Candidate(SEPARATE, {}, tuple(work for part in parts for work in part.launches))


def candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Both ways to run the block; one kernel in the tiles that compile without a spill."""
    yield _separate(p, gpu)
    bc, count = mlp_plan.pieces(p.channels)
    weights = 4.0 * p.channels * p.hidden
    for bm, bh, warps in ((64, 64, 4),):
        tiles = p.samples * -(-p.height * p.width // bm)
        padded, row = tiles * bm, 2.0 * p.channels
        halo = 1 + (p.side - 1) * p.width / bm  # rows of x that a program reads for one of its own
        ops = padded * (p.channels * (p.side**2 * TAP_OPS + CHANNEL_OPS) + p.hidden * mlp_plan.GELU_OPS)
        work = Work(
            dram_bytes=2 * row * p.samples * p.height * p.width + weights,
            l2_bytes=padded * row * (1 + halo) + tiles * weights,
            tensor_flops=4.0 * padded * bc * count * p.hidden / mlp_plan.TRITON_SHARE,
            fp32_ops=ops,
            programs=tiles,
            ctas_per_sm=2,
            warps=warps,
        )
        tile = {"BM": bm, "BC": bc, "PIECES": count, "BH": bh, "num_warps": warps, "num_stages": 2}
        packing = Work(dram_bytes=6.0 * p.channels * p.side**2, programs=-(-p.channels * p.side**2 // 256))
        yield Candidate(f"whole-m{bm}-h{bh}-w{warps}", {"tile": tile}, (packing, work), HANDICAP)


@tuning.remembered
def plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the block runs; without a tile the two ops."""
    p = p._replace(samples=1 << (p.samples - 1).bit_length())
    return tuning.pick("block_forward", p, tuple(candidates(p, gpu)), gpu)
