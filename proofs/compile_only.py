"""A Triton driver that compiles for a GPU that is not present. It records launches with their cubins and runs none.

    with compile_only(arch=90) as launches:
        kernel[grid](x, y, n, BLOCK=128)     # x, y: tensors on "meta"
    launches[0].cubin

Everything above the driver is Triton's own (specialisation of the arguments, compilation, the cache on disk), so the
recorded kernels are those that a GPU would run. Tensors on "meta" have no memory; Triton sees them as aligned to 16
bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers
from triton.runtime.cache import get_cache_manager

from convnext_kernels.backends.triton.ahead import TargetDriver

UNLIMITED = 2**31 - 1
SECONDS_FILE = "compile_seconds.txt"  # next to the kernel in Triton's cache, to know the time after a cache hit


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: str
    specialisation: str  # everything that distinguishes the compiled kernels of one function, readable and stable
    grid: tuple[int, int, int]
    arch: int
    warps: int
    shared: int  # dynamic shared memory, bytes
    tensor_memory: int  # columns (sm_100)
    seconds: float | None  # of compiling, the first time; None if the cache is older and has no time
    cubin: bytes = field(repr=False)
    ttir: str = field(repr=False)
    hash: str = field(repr=False)  # of the compiled kernel in Triton's cache


def _specialisation(source: Any, metadata: Any) -> str:
    """Return dtypes of the pointers, constants, integers known to be multiples of 16, warps and stages."""
    names = list(source.signature)

    def name(path: tuple[int, ...]) -> str:
        return ".".join([names[path[0]], *map(str, path[1:])])

    def value(constant: Any) -> str:
        return getattr(constant, "__name__", None) or str(constant)

    pointers = [f"{n.removesuffix('_ptr')}:{t[1:]}" for n, t in source.signature.items() if t[:1] == "*"]
    constants = [f"{name(path)}={value(constant)}" for path, constant in source.constants.items()]
    aligned = {name(path) for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    integers = [n for n, t in source.signature.items() if t in ("i32", "i64", "u64")]
    odd = [n for n, t in source.signature.items() if t[:1] == "*" and n not in aligned]
    parts = [
        ",".join(pointers),
        " ".join(constants),
        "".join(f" {n}%16" for n in integers if n in aligned).strip(),
        "".join(f" {n} unaligned" for n in odd).strip(),
        f"w{metadata.num_warps} s{metadata.num_stages}",
    ]
    extra = [f"{key}={metadata.maxnreg}" for key in ("maxnreg",) if getattr(metadata, key, None)]
    return "; ".join(part for part in parts + extra if part)


class Recorder:
    """Triton calls this instead of a launch; what it returns of a launch is kept by the driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def text(self, kind: str) -> str:
        """What Triton's cache has of the kernel: "ttir", ..."""
        file = get_cache_manager(self.metadata.hash).get_file(f"{self.source.name[:150]}.{kind}")
        return Path(file).read_text(encoding="utf-8")

    def __call__(self, x: int, y: int, z: int, stream: int, binary: bytes, *rest: Any) -> None:
        drivers.active.launches.append(self.launch((int(x), int(y), int(z)), binary))

    def launch(self, grid: tuple[int, int, int], cubin: bytes) -> Any:
        metadata = self.metadata
        if not metadata.enable_fp_fusion:
            raise RuntimeError(f"{metadata.name} is launched without enable_fp_fusion=True")
        seconds = get_cache_manager(metadata.hash).get_file(SECONDS_FILE)
        return Launch(
            metadata.name,
            _specialisation(self.source, metadata),
            grid,
            metadata.target.arch,
            metadata.num_warps,
            metadata.shared,
            getattr(metadata, "tmem_size", None) or 0,
            None if seconds is None else float(Path(seconds).read_text(encoding="utf-8")),
            cubin,
            self.text("ttir"),
            metadata.hash,
        )


class Utils:
    """What Triton asks of a GPU and its loader."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Kernels that do not fit are recorded and reported too, so Triton must not refuse them.
        return {"max_shared_mem": UNLIMITED, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[bool, bytes, int, int, int]:
        return True, cubin, 0, 0, 1024  # module, function (passed to the launcher), registers, spills, max. threads

    def unload_module(self, module: bool) -> None:
        pass


class CompileOnlyDriver(TargetDriver):
    """The device number is the architecture, because Triton keeps compiled kernels per device: they never mix."""

    def __init__(self, arch: int, device: str) -> None:
        super().__init__(GPUTarget("cuda", arch, 32), device)
        self.number, self.utils, self.launcher_cls = arch, Utils(), Recorder
        self.launches: list[Any] = []

    def get_current_device(self) -> int:
        return self.number


def _keep_compile_time(*, metadata: dict, times: Any, cache_hit: bool, **rest: Any) -> None:
    if not cache_hit:
        seconds = (times.ir_initialization + times.total_lowering) / 1e6
        get_cache_manager(metadata["hash"]).put(f"{seconds:.3f}", SECONDS_FILE, binary=False)


@contextmanager
def compile_only(arch: int, device: str = "meta") -> Iterator[list[Launch]]:
    """Compile for compute capability `arch` (90 for 9.0) and record launches on tensors of `device`."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels would not be compiled: unset it")
    driver, before = CompileOnlyDriver(arch, device), drivers._active
    drivers.set_active(driver)
    try:
        with triton.knobs.compilation.scope(), triton.knobs.language.scope():
            triton.knobs.compilation.listener = _keep_compile_time
            # Triton 3.10 makes a * b + c one instruction only with enable_fp_fusion; all our launches must set it.
            triton.knobs.language.default_fp_fusion = False
            yield driver.launches
    finally:
        drivers._active = before
