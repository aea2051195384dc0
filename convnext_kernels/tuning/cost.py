"""The cost model: the time of a launch is that of its busiest resource, plus what a launch costs anyhow.

Every figure it gives is a prediction; docs/design.md says what it leaves out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from convnext_kernels.tuning.gpus import Gpu

LAUNCH_SECONDS = 2e-6  # between two dependent kernels of one stream, CUDA graph or not the GPU needs about this


@dataclass(frozen=True)
class Work:
    """What one launch asks of the GPU, all its programs together."""

    dram_bytes: float = 0.0  # unique bytes read and written
    l2_bytes: float = 0.0  # bytes that the programs load and store, re-reads included
    tensor_flops: float = 0.0  # on tensor cores, multiply and add counted as two; padding included
    fp32_ops: float = 0.0  # executed instructions of the fp32 and integer lanes, per thread
    programs: int = 1
    ctas_per_sm: int = 1  # that fit at once
    tf32: bool = False  # tensor_flops are TF32


@dataclass(frozen=True)
class Candidate:
    """One way to run a kernel (or a chain of them): what the launcher needs, and what it would cost."""

    name: str  # stable across versions: the key in the cache
    config: Mapping[str, object] = field(hash=False)
    launches: tuple[Work, ...] = ()


def seconds(work: Work, gpu: Gpu) -> float:
    """Predicted time of one launch on `gpu`."""
    slots = gpu.sms * work.ctas_per_sm
    waves = -(-work.programs // slots)
    # The share of the machine that the programs keep busy, the last wave's emptiness included.
    busy = work.programs / (waves * slots)
    tensor_peak = gpu.tf32_tflops if work.tf32 else gpu.half_tflops
    return LAUNCH_SECONDS + max(
        work.dram_bytes / (gpu.dram_gbs * 1e9),
        work.l2_bytes / (gpu.l2_gbs * 1e9) / busy,
        work.tensor_flops / (tensor_peak * 1e12) / busy,
        work.fp32_ops / (gpu.fp32_tflops / 2 * 1e12) / busy,
    )
