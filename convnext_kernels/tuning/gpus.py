"""Data sheets of the GPUs that the cost model supports. Rates are peaks without sparsity, at the boost clock.

Sources: NVIDIA's data sheets of T4, A100 (SXM, 80 GB), A10, L40S, H100 (SXM), H200 (SXM) and HGX B200 (per GPU, dense);
the whitepapers "NVIDIA Ampere GA102" (RTX 3090), "NVIDIA Ada GPU architecture" (RTX 4090) and "NVIDIA RTX Blackwell GPU
architecture" (RTX 5090). GeForce cards run matmuls that accumulate in fp32 at half the rate that is advertised for fp16
accumulation; this table has the lower rate. Shared memory: CUDA C++ programming guide, table of compute capabilities.
L2 rates are round figures in the range of published microbenchmarks (Chips and Cheese, "Nvidia's H100: Funny L2, and
Tons of Bandwidth", 2023; "Microbenchmarking Nvidia's RTX 4090", 2022), scaled by multiprocessors and clock for GPUs
without one; they may be wrong by a quarter.

AMD: Instinct MI300X and MI250X (half of it, one GPU to the driver). Compute units and LDS agree with ROCm's
documentation ("MI300 series microarchitecture", "AMD GPU specifications"). Rates are compute units x operations a clock
x clock: 304 x (256 fp32, 2048 bf16) x 2.1 GHz and 110 x (128, 1024) x 1.7 GHz, as others print them from AMD's data
sheets; these were not at hand. L2 rates are 60 % of the peaks: 17.2 TB/s for the Infinity Cache, which all dies of
MI300X share, and 32 channels of 128 bytes a clock of 1.7 GHz. CDNA 2 has no TF32: its fp32 matrix rate. Multiprocessors
are compute units, shared memory is LDS. Nobody has compared predictions with such a GPU.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    """One GPU model."""

    name: str
    arch: int  # compute capability: 90 for 9.0
    sms: int
    shared_bytes: int  # shared memory that one CTA may use
    shared_sm_bytes: int  # shared memory of one multiprocessor, for all its CTAs
    dram_gbs: float  # GB/s
    l2_gbs: float  # GB/s
    l2_bytes: int
    fp32_tflops: float  # a multiply-add counts as two
    tf32_tflops: float  # tensor cores
    half_tflops: float  # tensor cores, bf16 or fp16 in, fp32 accumulation
    device: str = ""  # the driver's name of the GPU in this machine, which may only resemble this data sheet
    target: str = ""  # AMD: the architecture; `arch` is that of the NVIDIA GPU whose configurations it takes

    @property
    def machine(self) -> str:
        """What timed choices are kept for: the GPU in this machine."""
        return f"{self.device or self.name} {self.target or f'sm_{self.arch}'}"


_MB = 2**20
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 166912, 167936, 2039, 4000, 40 * _MB, 19.5, 156, 312),
        Gpu("A10", 86, 72, 101376, 102400, 600, 1800, 6 * _MB, 31.2, 62.5, 125),
        Gpu("RTX3090", 86, 82, 101376, 102400, 936, 2000, 6 * _MB, 35.6, 35.6, 71),
        Gpu("L40S", 89, 142, 101376, 102400, 864, 4000, 96 * _MB, 91.6, 183, 362),
        Gpu("RTX4090", 89, 128, 101376, 102400, 1008, 4500, 72 * _MB, 82.6, 82.6, 165.2),
        Gpu("H100", 90, 132, 232448, 233472, 3350, 5500, 50 * _MB, 66.9, 494.7, 989.4),
        Gpu("H200", 90, 132, 232448, 233472, 4800, 5500, 50 * _MB, 66.9, 494.7, 989.4),
        Gpu("B200", 100, 148, 232448, 233472, 8000, 9000, 126 * _MB, 75, 1100, 2250),
        Gpu("RTX5090", 120, 170, 101376, 102400, 1792, 6000, 96 * _MB, 104.8, 104.8, 209.5),
    )
}
# Turing, for which Triton no longer compiles: so it is not among the GPUs that `convnext-kernels plan` accepts. It has
# no TF32.
_T4 = Gpu("T4", 75, 40, 65536, 65536, 320, 1200, 4 * _MB, 8.1, 8.1, 65)
# AMD's, which `plan` does not accept either. sm_80: its configurations need the least.
_AMD = {
    gpu.target: gpu
    for gpu in (
        Gpu("MI300X", 80, 304, 65536, 65536, 5300, 10300, 256 * _MB, 163.4, 653.7, 1307.4, target="gfx942"),
        Gpu("MI250X", 80, 110, 65536, 65536, 1638, 4200, 8 * _MB, 23.9, 47.9, 191.5, target="gfx90a"),
    )
}
_BY_ARCH = {80: "A100", 86: "A10", 89: "L40S", 90: "H100", 100: "B200", 103: "B200", 120: "RTX5090"}


def for_arch(arch: int) -> Gpu:
    """The GPU whose data sheet is used for an architecture if the name is unknown: the nearest that is not newer."""
    known = [a for a in _BY_ARCH if a <= arch]
    return GPUS[_BY_ARCH[max(known)]] if known else _T4


def for_device(name: str, arch: int | str) -> Gpu:
    """The GPU with the driver's name `name` ("NVIDIA GeForce RTX 4090"), else that of its architecture (`for_arch`).

    `arch` is a string for AMD's GPUs, perhaps with features ("gfx942:sramecc+:xnack-"); one without a data sheet gets
    that of gfx90a.
    """
    if isinstance(arch, str):
        target = arch.partition(":")[0]
        return replace(_AMD.get(target, _AMD["gfx90a"]), device=name, target=target)
    plain = name.replace(" ", "")
    sheet = next((gpu for gpu in GPUS.values() if gpu.name in plain and gpu.arch == arch), None) or for_arch(arch)
    return replace(sheet, device=name)


def named(name: str) -> Gpu:
    """The GPU with that name, in any case and with spaces, dashes or vendor: "h100", "RTX 4090", "NVIDIA L40S".

    Raises ValueError for any other name; the message lists the known ones.
    """
    plain = "".join(c for c in name.upper() if c.isalnum()).removeprefix("NVIDIA").removeprefix("GEFORCE")
    if plain not in GPUS:
        raise ValueError(f"unknown GPU {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[plain]
