"""The cost model: a launch takes as long as its busiest resource does, plus what any launch costs.

Resources are device memory, L2, tensor cores and issue slots. Programs are spread over the multiprocessors; the fullest
one sets the time, so that a last, half empty wave costs a whole one, and a multiprocessor with too few warps on it runs
below its rate. Every figure is a prediction. Left out:

- what a program cannot overlap with itself (prologue, epilogue, barriers): the products of a tile and its GELU are
  taken to run at the same time, in other programs if need be;
- data that stays in L2 from one launch to the next: batch 1 is charged for device memory;
- bank conflicts, uncoalesced access, spills, and clocks below boost under load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from convnext_kernels.tuning.gpus import Gpu

LAUNCH_SECONDS = 2e-6  # between two dependent kernels of one stream, CUDA graph or not the GPU needs about this
# Shares of the peaks that good kernels sustain. Rules of thumb; `l2_gbs` is a measured rate already.
DRAM_SHARE = 0.9
ISSUE_SHARE = 0.85
# Warps on a multiprocessor that hide latencies with the instruction-level parallelism of unrolled kernels: two for
# each of the four schedulers; one is enough to feed the tensor cores, whose instructions are long.
ISSUE_WARPS = 8
TENSOR_WARPS = 4
DRAM_SMS = 0.5  # share of the multiprocessors whose loads together fill the memory bus


@dataclass(frozen=True)
class Work:
    """What one launch asks of the GPU, all its programs together."""

    dram_bytes: float = 0.0  # unique bytes read and written
    l2_bytes: float = 0.0  # bytes that the programs load and store, re-reads included
    # On tensor cores, multiply and add counted as two; padding included. Divided by the share of the peak that such a
    # kernel reaches: the launcher knows whether it is the library's or one of ours.
    tensor_flops: float = 0.0
    fp32_ops: float = 0.0  # executed instructions of the fp32 and integer lanes, per thread
    programs: int = 1
    ctas_per_sm: int = 1  # that fit at once
    tf32: bool = False  # tensor_flops are TF32
    warps: int = 8  # of one program


@dataclass(frozen=True)
class Candidate:
    """One way to run a kernel (or a chain of them): what the launcher needs, and what it would cost."""

    name: str  # stable across versions: the key in the cache
    config: Mapping[str, object] = field(hash=False)
    launches: tuple[Work, ...] = ()
    # A prediction has to be better by this factor to be chosen: for plans with more launches or with foreign kernels,
    # whose predictions are worth less. Timed choices ignore it.
    handicap: float = 1.0

    def seconds(self, gpu: Gpu) -> float:
        """Predicted time of all launches on `gpu`."""
        return sum(seconds(work, gpu) for work in self.launches)


def seconds(work: Work, gpu: Gpu) -> float:
    """Predicted time of one launch on `gpu`."""
    if work.programs <= 0:
        return LAUNCH_SECONDS
    fullest = -(-work.programs // gpu.sms)  # programs of the fullest multiprocessor
    spread = work.programs / (fullest * gpu.sms)
    warps = max(1, min(work.ctas_per_sm, fullest)) * work.warps
    issue, tensor = (spread * min(1.0, warps / needed) for needed in (ISSUE_WARPS, TENSOR_WARPS))
    # The bus is shared: loads of some of the multiprocessors fill it, if these have enough warps in flight.
    active = min(1.0, work.programs / gpu.sms) * min(1.0, warps / ISSUE_WARPS)
    dram = min(1.0, active / DRAM_SMS)
    tensor_peak = (gpu.tf32_tflops if work.tf32 else gpu.half_tflops) * 1e12
    return LAUNCH_SECONDS + max(
        work.dram_bytes / (gpu.dram_gbs * 1e9 * DRAM_SHARE * dram),
        work.l2_bytes / (gpu.l2_gbs * 1e9 * issue),
        work.tensor_flops / (tensor_peak * tensor),
        work.fp32_ops / (gpu.fp32_tflops / 2 * 1e12 * ISSUE_SHARE * issue),
    )


CUBLAS_SHARE = 0.75  # of the tensor cores' peak, that the products of a vendor's library reach
_CUBLAS_TILES = ((128, 128), (128, 64), (64, 64))


def cublas_product(rows: int, inner: int, outer: int, itemsize: int, gpu: Gpu, tf32: bool = False) -> Work:
    """(rows, inner) x (inner, outer) by the vendor's library: the best of its usual tiles, split over `inner` or not.

    Elements have `itemsize` bytes; 4 bytes run on the fp32 lanes unless they may be rounded to TF32.
    """
    flops = 2.0 * rows * inner * outer / CUBLAS_SHARE
    on_lanes = itemsize == 4 and not tf32
    found = []
    for bm, bn in _CUBLAS_TILES:
        tiles = -(-rows // bm) * -(-outer // bn)
        for split in (1, max(1, min(gpu.sms // tiles, inner // 256))):
            padding = -(-rows // bm) * bm * -(-outer // bn) * bn / (rows * outer)
            work = Work(
                dram_bytes=float((rows * (inner + outer) + inner * outer) * itemsize),
                l2_bytes=float(tiles * (bm + bn) * inner * itemsize + 4 * 2 * (split - 1) * rows * outer),
                tensor_flops=0.0 if on_lanes else flops * padding,
                fp32_ops=flops * padding / 2 if on_lanes else 0.0,
                tf32=tf32,
                programs=tiles * split,
                ctas_per_sm=1 if bm * bn == 128 * 128 else 2,
            )
            found.append(work)
    return min(found, key=lambda work: seconds(work, gpu))
