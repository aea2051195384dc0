"""Compile every Triton kernel for AMD's gfx942 (MI300) and gfx90a (MI250), without a GPU. Nothing is run or timed.

    python proofs/triton_rocm.py [--only TEXT]

It prints a line for each kernel: registers, spills, scratch memory and LDS of the worst of its compilations, and fails
if a case does not compile, spills, needs more than 64 KB of LDS, keeps an inline instruction, or has 16-bit products
without MFMA.

With TRITON_CACHE_DIR a second run is fast.
"""

import re
import sys
from dataclasses import dataclass

import click
import torch

torch.version.hip = "none: compiled only"  # before the backend is imported, which asks this for portable code

import triton_cases
from compile_only import CompileOnlyDriver, Recorder, Utils
from triton.backends.amd.driver import ty_to_cpp
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers
from triton_static import MATRIX

ARCHS = ("gfx942", "gfx90a")
LDS = 65536
_FIELDS = {
    "vgprs": r"\.vgpr_count:\s+(\d+)",
    "spilled": r"\.vgpr_spill_count:\s+(\d+)",
    "scratch": r"\.private_segment_fixed_size:\s+(\d+)",
    "lds": r"\.group_segment_fixed_size:\s+(\d+)",
}


@dataclass(frozen=True)
class Kernel:
    """One compilation: what AMD's assembler says of it."""

    name: str
    vgprs: int
    spilled: int
    scratch: int  # bytes of a lane
    lds: int
    wrong: tuple[str, ...]


class _Recorder(Recorder):
    def launch(self, grid: tuple[int, int, int], _binary: bytes) -> Kernel:
        assembly, ttir = self.text("amdgcn"), self.text("ttir")
        values = {name: int(re.search(pattern, assembly).group(1)) for name, pattern in _FIELDS.items()}
        lds = max(values.pop("lds"), self.metadata.shared)
        only_fp32 = not re.search(r"tt\.dot [^\n]*tensor<[^>]*x(bf16|f16)>", ttir)  # TF32 is NVIDIA's
        wrong = {
            f"{lds} bytes of LDS, limit {LDS}": lds > LDS,
            "{spilled} registers spilled, {scratch} bytes of scratch memory".format(**values): values["spilled"]
            or values["scratch"],
            "an inline instruction": "elementwise_inline_asm" in ttir,
            "16-bit products without MFMA": MATRIX.search(ttir) and "v_mfma" not in assembly and not only_fp32,
        }
        return Kernel(self.metadata.name, **values, lds=lds, wrong=tuple(line for line, true in wrong.items() if true))


class _Utils(Utils):
    def get_device_properties(self, device: int) -> dict[str, int]:
        return super().get_device_properties(device) | {"multiprocessor_count": 104, "warpSize": 64}


class RocmDriver(CompileOnlyDriver):
    """Its device number is its place in ARCHS."""

    def __init__(self, arch: str) -> None:
        super().__init__(ARCHS.index(arch), "meta")
        self.target = GPUTarget("hip", arch, 64)
        self.utils, self.launcher_cls = _Utils(), _Recorder

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty_to_cpp(ty)


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", default="", help="Only cases with this text in their name.")
def main(only: str) -> None:
    cases = [case for case in triton_cases.COMPILED if only in str(case)]
    failures = [] if cases else [f"no case has {only!r} in its name"]
    for arch in ARCHS:
        driver = RocmDriver(arch)
        drivers.set_active(driver)
        for case in cases:
            before = len(driver.launches)
            try:
                triton_cases.run(case)
            except Exception as error:
                failures.append(f"{arch} {case}: {type(error).__name__}: {' '.join(str(error).split()):.300}")
            failures += [f"{arch} {case}: {k.name}: {wrong}" for k in driver.launches[before:] for wrong in k.wrong]
        print(f"{arch}: {len(cases)} cases, {len(driver.launches)} launches")
        print(f"  {'kernel':<32} {'VGPRs':>6} {'spilled':>8} {'scratch':>8} {'LDS':>6}")
        for name in sorted({k.name for k in driver.launches}):
            same = [k for k in driver.launches if k.name == name]
            most = (max(getattr(k, field) for k in same) for field in ("vgprs", "spilled", "scratch", "lds"))
            print("  {:<32} {:>6} {:>8} {:>8} {:>6}".format(name, *most))
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
