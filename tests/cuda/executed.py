"""nvcc's PTX executed on the CPU: the backend's own launchers, on CPU tensors, their launches given to an emulator.

The emulator (module `ptxemu`) is not part of this repository; it checks accesses, races and uninitialised reads.
"""

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from convnext_kernels.backends.cuda import native

ROOT = Path(__file__).resolve().parents[2]
# compute capability: multiprocessors, shared memory of a block (A100, RTX 4090, H100, B200, RTX 5090; T4 for 75)
DEVICES = {
    75: (40, 65536),
    80: (108, 166912),
    86: (84, 101376),
    89: (128, 101376),
    90: (132, 232448),
    100: (148, 232448),
    120: (170, 101376),
}


@functools.cache
def _entries(arch: int, folder: Path) -> dict[str, object]:
    """Every kernel of csrc/cuda by its mangled name, compiled for `arch`; what is up to date is kept."""
    import ptxemu

    folder.mkdir(parents=True, exist_ok=True)
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*"))
    running = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        ptx = folder / f"{source.stem}.sm_{arch}.ptx"
        if not ptx.exists() or ptx.stat().st_mtime < newest:
            command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-ptx", source, "-o", ptx]
            running[source] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if len(running) % 2 == 0:
            _wait(running)
    _wait(running)
    found = {}
    for ptx in folder.glob(f"*.sm_{arch}.ptx"):
        module = ptxemu.Module(ptx.read_text())
        found |= dict.fromkeys(module.kernels, module)
    return found


def _wait(running: dict[Path, subprocess.Popen]) -> None:
    for source, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"nvcc {source}: {output}")
    running.clear()


@functools.cache
def _kernel(arch: int, folder: Path, symbol: str) -> object:
    return _entries(arch, folder)[symbol].kernel(symbol)


@dataclass
class Executor:
    """Tensors of this process as buffers of the emulator, and what was launched."""

    arch: int
    folder: Path
    check: bool
    launches: list = field(default_factory=list)  # of ptxemu's finished launches

    def __post_init__(self) -> None:
        import ptxemu

        self._memory = ptxemu.Mem()
        self._spans: dict[tuple[int, int], int] = {}  # host (first, end) -> emulated first

    def address(self, tensor: Tensor | None) -> int:
        """The emulated address of a tensor, congruent to the real one modulo 64."""
        if tensor is None:
            return 0
        storage = tensor.untyped_storage()
        span = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        if span not in self._spans:
            for old in [s for s in self._spans if s[0] < span[1] and span[0] < s[1]]:  # freed since
                base = self._spans.pop(old)
                self._memory.bufs = [b for b in self._memory.bufs if b.base != base]
            raw = np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(span[0]), np.uint8)
            self._spans[span] = self._memory.add(raw, name=str(tuple(tensor.shape)), phase=span[0] % 64)
        return self._spans[span] + tensor.data_ptr() - span[0]

    def __call__(self, symbol: str, grid: int, threads: int, shared_bytes: int, params: bytes) -> None:
        import ptxemu

        for buffer in self._memory.bufs:
            buffer.rd[:] = buffer.wr[:] = False
        try:
            done = _kernel(self.arch, self.folder, symbol).launch(
                (grid,), [params], block=(threads,), smem=shared_bytes, mem=self._memory, check=self.check
            )
        except ptxemu.PTXError as error:
            raise ptxemu.PTXError(f"{symbol} (sm_{self.arch}, grid {grid}, {threads} threads): {error}") from None
        self.launches.append(done)


def missing() -> str:
    """What is lacking for this; empty when all is there."""
    try:
        import ptxemu  # noqa: F401
    except ImportError:
        return "the PTX emulator is not on the path"
    if not shutil.which("nvcc"):
        return "there is no nvcc"
    return "" if native.on_host() else "the extension that runs on the host is not built"


@contextmanager
def executed(arch: int, check: bool = True, folder: Path = ROOT / "build" / "cuda_ptx") -> Iterator[Executor]:
    """``with executed(90) as run:``: launches of backend "cuda" execute nvcc's PTX for sm_90; `run.launches` has them."""
    extension = native.extension()
    executor = Executor(arch, folder, check)
    multiprocessors, shared = DEVICES[arch]
    address, native.address = native.address, executor.address
    extension.set_device(arch, multiprocessors, shared)
    extension.set_recorder(executor)
    try:
        yield executor
    finally:
        native.address = address
        extension.set_recorder(None)
        extension.set_device()
