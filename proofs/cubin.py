"""Read the resources and instructions of a compiled kernel from its cubin, with cuobjdump and nvdisasm.

The tools come from the triton wheel, PATH or a CUDA toolkit; the newest ones are used, because they read the output of
older compilers.
"""

import collections
import functools
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Multiprocessor:
    """Resources of one multiprocessor (CUDA programming guide, table of compute capabilities)."""

    warps: int
    ctas: int
    shared_bytes: int
    shared_cta_bytes: int  # the limit of one CTA
    registers: int = 65536


_LIMITS = {
    80: Multiprocessor(64, 32, 167936, 166912),
    86: Multiprocessor(48, 16, 102400, 101376),
    89: Multiprocessor(48, 24, 102400, 101376),
    90: Multiprocessor(64, 32, 233472, 232448),
    100: Multiprocessor(64, 32, 233472, 232448),
    120: Multiprocessor(48, 24, 102400, 101376),
}
ARCHS = tuple(_LIMITS)
RESERVED_BYTES = 1024  # of shared memory, per CTA, by the system
TENSOR_MEMORY_COLUMNS = 512  # of one multiprocessor (sm_100)
_TENSOR = re.compile(r"(HMMA|HGMMA|QGMMA|IMMA|IGMMA|DMMA|OMMA|QMMA|UTC\w*MMA)")
_WIDTH = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(frozen=True)
class Statics:
    """One kernel on one architecture. Spills are the bytes per thread of the spill instructions, each counted once."""

    registers: int
    stack: int  # local memory of a thread, bytes
    spill_stores: int
    spill_loads: int
    shared: int  # static and dynamic, bytes
    tensor_memory: int  # columns
    ctas: int  # that fit on a multiprocessor at once
    occupancy: float  # share of its warps
    instructions: int
    ffma: float  # share of the instructions
    tensor: dict[str, int]  # opcodes on tensor cores


def limits(arch: int) -> Multiprocessor:
    """Return the limits of compute capability `arch`."""
    return _LIMITS[arch]


@dataclass(frozen=True)
class Usage:
    """The resources that a kernel needs, from cuobjdump."""

    registers: int
    stack: int  # local memory of a thread, bytes
    shared: int  # static, bytes


@functools.cache
def tool(name: str) -> str:
    """Return the path of the newest program with this name."""
    triton = importlib.util.find_spec("triton")
    wheel = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    folders = [*wheel, *os.get_exec_path(), *glob.glob("/usr/local/cuda*/bin")]
    versions = {}
    for found in filter(None, (shutil.which(name, path=str(folder)) for folder in folders)):
        done = subprocess.run([found, "--version"], capture_output=True, text=True)
        if version := re.search(r"release (\d+)\.(\d+), V\d+\.\d+\.(\d+)", done.stdout):
            versions.setdefault(tuple(map(int, version.groups())), found)
    if not versions:
        raise RuntimeError(f"{name}: not found on PATH, in the installed triton or in /usr/local/cuda*")
    return versions[max(versions)]


def run_tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Run a tool in `folder` and return its output."""
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(done.stderr.split())}")
    return done.stdout


@contextmanager
def _written(cubin: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield Path(file.name)


def span(values: Iterable[float], form: str = "{:.0f}") -> str:
    """Return the range of the values, as in "24-40"."""
    values = list(values)
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def resident(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Return how many CTAs fit on one multiprocessor at once; 0 if not even one fits."""
    limit = _LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are allocated to warps in units of 256
    # Each of four schedulers has a quarter of the registers, and a warp stays on one scheduler.
    by_registers = limit.registers // 4 // max(per_warp, 1) * 4 // warps
    if shared > limit.shared_cta_bytes:
        return 0
    by_shared = limit.shared_bytes // (-(-(shared + RESERVED_BYTES) // 128) * 128)
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else limit.ctas
    return min(limit.ctas, limit.warps // warps, by_registers, by_shared, by_tensor_memory)


def usage(file: Path, arch: int) -> dict[str, Usage]:
    """Return the resources of the kernels of a cubin, by mangled name."""
    found = re.findall(
        r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        run_tool("cuobjdump", "-res-usage", file),
    )
    # From sm_90 on the figure includes what the system reserves, if the kernel uses shared memory at all.
    reserved = RESERVED_BYTES if arch >= 90 else 0
    return {
        name: Usage(int(registers), int(stack) + int(local), max(0, int(shared) - reserved))
        for name, registers, stack, shared, local in found
    }


def sass(file: Path) -> dict[str, str]:
    """Return nvdisasm's text of the kernels of a cubin, by mangled name."""
    text = run_tool("nvdisasm", "-c", file)
    _, *parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*\n", text, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def opcodes(text: str) -> list[str]:
    """Return the opcodes in nvdisasm's text, without padding."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    return [opcode for opcode in found if opcode != "NOP"]


def moved(opcodes: list[str], name: str) -> int:
    """Return the bytes per thread that the LDL or STL instructions move."""
    total = 0
    for opcode in opcodes:
        first, *modifiers = opcode.split(".")
        if first == name:
            total += next((_WIDTH[m] for m in modifiers if m in _WIDTH), 4)
    return total


def tensor(opcodes: list[str]) -> dict[str, int]:
    """Count the instructions that run on tensor cores, by name."""
    return dict(sorted(collections.Counter(m[0] for o in opcodes if (m := _TENSOR.match(o))).items()))


def analyse(cubin: bytes, kernel: str, arch: int, warps: int, shared: int, tensor_memory: int) -> Statics:
    """Read one kernel of a cubin. `shared` is its dynamic shared memory, `tensor_memory` its columns."""
    with _written(cubin) as file:
        used = usage(file, arch).get(kernel)
        found = opcodes(run_tool("nvdisasm", "-c", file))
    if used is None:
        raise RuntimeError(f"cuobjdump does not find {kernel} in its cubin for sm_{arch}")
    ctas = resident(arch, used.registers, used.shared + shared, warps, tensor_memory)
    return Statics(
        used.registers,
        used.stack,
        moved(found, "STL"),
        moved(found, "LDL"),
        used.shared + shared,
        tensor_memory,
        ctas,
        ctas * warps / _LIMITS[arch].warps,
        len(found),
        round(sum(o.startswith("FFMA") for o in found) / max(1, len(found)), 4),
        tensor(found),
    )


def loop_ffma(cubin: bytes) -> float:
    """Return the share of FFMA in the loop that has the most of them; 0 without a loop. Of a cubin with one kernel."""
    with _written(cubin) as file:
        lines = run_tool("nvdisasm", "-c", file).splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    best = (0, 0.0)
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)
        if target is None or labels.get(target[1], end) >= end:
            continue
        found = opcodes("\n".join(lines[labels[target[1]] : end + 1]))
        count = sum(o.startswith("FFMA") for o in found)
        best = max(best, (count, count / max(1, len(found))))
    return best[1]
