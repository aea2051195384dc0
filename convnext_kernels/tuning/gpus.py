"""Data sheets of the GPUs that the cost model knows. Rates are peaks without sparsity, at the boost clock."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU model; the figures are the vendor's, except `l2_gbs` (microbenchmarks; see docs/design.md)."""

    name: str
    arch: int  # compute capability: 90 for 9.0
    sms: int
    shared_bytes: int  # that one CTA may use
    shared_sm_bytes: int  # of one multiprocessor, for all its CTAs
    dram_gbs: float  # GB/s
    l2_gbs: float  # GB/s
    l2_bytes: int
    fp32_tflops: float
    tf32_tflops: float  # tensor cores
    half_tflops: float  # tensor cores, bf16 or fp16 in, fp32 accumulation


_MB = 2**20
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 166912, 167936, 2039, 4000, 40 * _MB, 19.5, 156, 312),
        Gpu("A10", 86, 72, 101376, 102400, 600, 1800, 6 * _MB, 31.2, 62.5, 125),
        Gpu("RTX3090", 86, 82, 101376, 102400, 936, 2000, 6 * _MB, 35.6, 35.6, 71),
        Gpu("L40S", 89, 142, 101376, 102400, 864, 4000, 96 * _MB, 91.6, 183, 362),
        Gpu("RTX4090", 89, 128, 101376, 102400, 1008, 4500, 72 * _MB, 82.6, 82.6, 165),
        Gpu("H100", 90, 132, 232448, 233472, 3350, 5500, 50 * _MB, 66.9, 494, 989),
        Gpu("H200", 90, 132, 232448, 233472, 4800, 5500, 50 * _MB, 66.9, 494, 989),
        Gpu("B200", 100, 148, 232448, 233472, 8000, 9000, 126 * _MB, 75, 1125, 2250),
        Gpu("RTX5090", 120, 170, 101376, 102400, 1792, 6000, 96 * _MB, 104.8, 104.8, 209.5),
    )
}
_BY_ARCH = {80: "A100", 86: "A10", 89: "L40S", 90: "H100", 100: "B200", 103: "B200", 120: "RTX5090"}


def for_arch(arch: int) -> Gpu:
    """The GPU that stands for an architecture when its name is unknown: the nearest one not newer."""
    known = [a for a in _BY_ARCH if a <= arch] or [min(_BY_ARCH)]
    return GPUS[_BY_ARCH[max(known)]]
