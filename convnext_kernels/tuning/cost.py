"""The cost model: a launch takes the time of its busiest resource, plus a constant for the launch itself.

Resources are device memory, L2, tensor cores and issue slots. Programs are spread over the multiprocessors, and the one
with the most programs decides: a last, half empty wave costs a whole one. A multiprocessor with too few warps runs
below its peak rate. Every figure is a prediction. The model leaves out:

- what a program cannot overlap with itself (prologue, epilogue, barriers): the matmuls of a tile and its GELU are
  assumed to run at the same time, if necessary in different programs;
- data that stays in L2 from one launch to the next: batch 1 is charged for device memory;
- bank conflicts, uncoalesced access, spills, and clocks below boost under load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from convnext_kernels.tuning.gpus import Gpu

LAUNCH_SECONDS = 2e-6  # about: between two dependent kernels of a stream, with or without a CUDA graph
# Shares of the peaks that good kernels sustain. Rules of thumb; `l2_gbs` is already a measured rate.
DRAM_SHARE = 0.9
ISSUE_SHARE = 0.85
# Warps of a multiprocessor that hide latencies with the instruction-level parallelism of unrolled kernels: two for
# each of the four schedulers. One is enough for the tensor cores, whose instructions are long.
ISSUE_WARPS = 8
TENSOR_WARPS = 4
DRAM_SMS = 0.5  # share of the multiprocessors whose loads together fill the memory bus


@dataclass(frozen=True)
class Work:
    """The work of one launch, all its programs together."""

    dram_bytes: float = 0.0  # unique bytes read and written
    l2_bytes: float = 0.0  # bytes that the programs load and store, re-reads included
    # On tensor cores; a multiply-add counts as two; padding included. Divided by the share of the peak that the kernel
    # reaches: the launcher knows whether it is cuBLAS or one of ours.
    tensor_flops: float = 0.0
    fp32_ops: float = 0.0  # executed instructions of the fp32 and integer lanes, per thread
    programs: int = 1
    ctas_per_sm: int = 1  # that fit at the same time
    tf32: bool = False  # tensor_flops are TF32
    warps: int = 8  # of one program


@dataclass(frozen=True)
class Candidate:
    """One way to run a kernel (or a chain of kernels): what the launcher needs, and the predicted cost."""

    name: str  # stable across versions: the key in the cache
    config: Mapping[str, object] = field(hash=False)
    launches: tuple[Work, ...] = ()
    # The predicted time is multiplied by this before it is compared. Above 1 for plans with more launches or with
    # kernels that are not ours, whose predictions are less reliable. Timed choices ignore it.
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
    # The memory bus is shared: the loads of some multiprocessors fill it, if they have enough warps.
    active = min(1.0, work.programs / gpu.sms) * min(1.0, warps / ISSUE_WARPS)
    dram = min(1.0, active / DRAM_SMS)
    tensor_peak = (gpu.tf32_tflops if work.tf32 else gpu.half_tflops) * 1e12
    return LAUNCH_SECONDS + max(
        work.dram_bytes / (gpu.dram_gbs * 1e9 * DRAM_SHARE * dram),
        work.l2_bytes / (gpu.l2_gbs * 1e9 * issue),
        work.tensor_flops / (tensor_peak * tensor),
        work.fp32_ops / (gpu.fp32_tflops / 2 * 1e12 * ISSUE_SHARE * issue),
    )


CUBLAS_SHARE = 0.75  # of the tensor cores' peak that cuBLAS reaches
_CUBLAS_TILES = ((128, 128), (128, 64), (64, 64))


def cublas_product(rows: int, inner: int, outer: int, itemsize: int, gpu: Gpu, tf32: bool = False) -> Work:
    """A matmul (rows, inner) x (inner, outer) by cuBLAS: the best of its usual tiles, split over `inner` or not.

    Elements have `itemsize` bytes; elements of 4 bytes run on the fp32 lanes unless they may be rounded to TF32.
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
