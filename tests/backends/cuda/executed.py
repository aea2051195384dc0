"""nvcc's PTX executed on the CPU: the backend's own launchers, on CPU tensors, their launches given to an emulator.

The emulator (module `ptxemu`) is not part of this repository; it checks accesses, races and uninitialised reads.
"""

import collections
import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.gpu import prepared

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
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


def _sources(path: Path) -> set[Path]:
    """A file of csrc and what it includes from there."""
    found, todo = set(), [path]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            names = re.findall(r'^#include "(.+)"', current.read_text(), flags=re.M)
            todo += [CSRC / name for name in names if (CSRC / name).exists()]
    return found


@functools.cache
def _module(arch: int, folder: Path, source: Path) -> object:
    """The kernels of a .cu file compiled for `arch`; what is up to date is kept."""
    import ptxemu

    folder.mkdir(parents=True, exist_ok=True)
    ptx = folder / f"{source.stem}.sm_{arch}.ptx"
    if not ptx.exists() or ptx.stat().st_mtime < max(p.stat().st_mtime for p in _sources(source)):
        part = ptx.with_suffix(f".{os.getpid()}")  # another worker may compile the same
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", f"-I{CSRC}", "-ptx", source, "-o", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc {source}: {done.stdout}{done.stderr}")
        part.replace(ptx)
    return ptxemu.Module(_direct_parameters(ptx.read_text()))


@functools.cache
def _kernel(arch: int, folder: Path, symbol: str) -> object:
    """A kernel by its mangled name, _ZN3cnk4cuda<length><name>..."""
    length, rest = re.fullmatch(r"_ZN3cnk4cuda(\d+)(.*)", symbol).groups()
    defined = re.compile(rf"__global__[^;{{]*\b{rest[: int(length)]}\(")
    source = next(path for path in sorted((CSRC / "cuda").rglob("*.cu")) if defined.search(path.read_text()))
    return _module(arch, folder, source).kernel(symbol)


def _direct_parameters(ptx: str) -> str:
    """The same program with parameters loaded by name where nvcc loads them by address, which the emulator lacks.

    nvcc writes ``mov.b64 %rd1, kernel_param_0; add.s64 %rd2, %rd1, 28; ld.param.u32 %r1, [%rd2+4];``.
    """
    functions = re.split(r"(?=^\.visible \.entry|^\.entry)", ptx, flags=re.M)
    for i, text in enumerate(functions):
        known = {}  # register: (parameter, offset)
        for register, parameter in re.findall(r"mov\.b64\s+(%rd\d+), (\w+_param_\d+);", text):
            known[register] = (parameter, 0)
        while True:
            derived = re.findall(r"(?:add\.s64|mov\.[bu]64)\s+(%rd\d+), (%rd\d+)(?:, (-?\d+))?;", text)
            new = {r: (known[a][0], known[a][1] + int(k or 0)) for r, a, k in derived if a in known and r not in known}
            if not new:
                break
            known |= new
        if not known:
            continue
        assigned = re.compile(r"^[ \t]*\S+\s+(%rd\d+), .*\n", flags=re.M)
        count = collections.Counter(r for r in assigned.findall(text) if r in known)
        if set(count.values()) != {1}:
            raise RuntimeError(f"an address of a parameter is chosen at run time: {count.most_common(3)}")
        text = assigned.sub(lambda m, k=known: "" if m[1] in k else m[0], text)

        def named(match: re.Match, known: dict = known) -> str:
            if match[1] not in known:
                return match[0]
            parameter, offset = known[match[1]]
            return f"[{parameter}+{offset + int(match[2] or 0)}]"

        functions[i] = re.sub(r"\[(%rd\d+)(?:\+(-?\d+))?\]", named, text)
    return "".join(functions)


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
def executed(
    arch: int, check: bool = True, folder: Path = ROOT / "build" / "cuda_ptx", multiprocessors: int | None = None
) -> Iterator[Executor]:
    """``with executed(90) as run:``: the CUDA backend executes nvcc's PTX for sm_90, and `run.launches` tells of it.

    `multiprocessors`: what launchers plan for instead of the architecture's largest GPU.
    """
    if reason := missing():
        pytest.skip(reason)
    extension = native.extension()
    executor = Executor(arch, folder, check)
    count, shared = DEVICES[arch]
    address, native.address = native.address, executor.address
    # Every launcher runs as it is: what is replayed has addresses of which the executor knows no tensor.
    inputs_of, prepared.inputs_of = prepared.inputs_of, lambda _: None
    extension.set_device(arch, multiprocessors or count, shared)
    extension.set_recorder(executor)
    try:
        yield executor
    finally:
        native.address, prepared.inputs_of = address, inputs_of
        extension.set_recorder(None)
        extension.set_device()
