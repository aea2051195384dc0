"""What a compiled kernel needs and consists of, read from its cubin with the tools of the triton wheel."""

import collections
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Multiprocessor:
    """What the CTAs of one multiprocessor share (CUDA programming guide, table of compute capabilities)."""

    warps: int
    ctas: int
    shared_bytes: int
    shared_cta_bytes: int  # that one CTA may have
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
    """One kernel on one architecture. Spills are bytes a thread moves where the code stands, not how often it runs."""

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
    """Limits of compute capability `arch`."""
    return _LIMITS[arch]


@functools.cache
def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise RuntimeError(f"{name} is not part of the installed triton ({path})")
    return str(path)


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([_tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(done.stderr.split())}")
    return done.stdout


def resident(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """CTAs that fit on one multiprocessor at once; 0 when not even one does."""
    limit = _LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are given to warps in units of 256
    # Four schedulers own a quarter of the registers each, and a warp stays with one.
    by_registers = limit.registers // 4 // max(per_warp, 1) * 4 // warps
    if shared > limit.shared_cta_bytes:
        return 0
    by_shared = limit.shared_bytes // (-(-(shared + RESERVED_BYTES) // 128) * 128)
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else limit.ctas
    return min(limit.ctas, limit.warps // warps, by_registers, by_shared, by_tensor_memory)


def _opcodes(sass: str) -> list[str]:
    """Opcodes of nvdisasm's text, padding left out."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    return [opcode for opcode in found if opcode != "NOP"]


def _moved(opcodes: list[str], name: str) -> int:
    """Bytes that the LDL or STL instructions move, per thread."""
    total = 0
    for opcode in opcodes:
        first, *modifiers = opcode.split(".")
        if first == name:
            total += next((_WIDTH[m] for m in modifiers if m in _WIDTH), 4)
    return total


def analyse(cubin: bytes, kernel: str, arch: int, warps: int, shared: int, tensor_memory: int) -> Statics:
    """Read one kernel of a cubin; `shared` is its dynamic shared memory, `tensor_memory` its columns."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        opcodes = _opcodes(_run("nvdisasm", "-c", file.name))
    found = re.search(rf"Function {re.escape(kernel)}:\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not see {kernel} in its cubin for sm_{arch}: {usage[:200]!r}")
    registers, stack, static, local = map(int, found.groups())
    # From sm_90 on the figure holds what the system reserves, as far as the kernel uses shared memory at all.
    static = max(0, static - RESERVED_BYTES) if arch >= 90 else static
    ctas = resident(arch, registers, static + shared, warps, tensor_memory)
    return Statics(
        registers,
        stack + local,
        _moved(opcodes, "STL"),
        _moved(opcodes, "LDL"),
        static + shared,
        tensor_memory,
        ctas,
        ctas * warps / _LIMITS[arch].warps,
        len(opcodes),
        round(sum(o.startswith("FFMA") for o in opcodes) / max(1, len(opcodes)), 4),
        dict(sorted(collections.Counter(m[0] for o in opcodes if (m := _TENSOR.match(o))).items())),
    )


def loop_ffma(cubin: bytes) -> float:
    """Share of FFMA among the instructions of the loop that has most of them; 0 without a loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = _run("nvdisasm", "-c", file.name).splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    best = (0, 0.0)
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)
        if target is None or labels.get(target[1], end) >= end:
            continue
        opcodes = _opcodes("\n".join(lines[labels[target[1]] : end + 1]))
        count = sum(o.startswith("FFMA") for o in opcodes)
        best = max(best, (count, count / max(1, len(opcodes))))
    return best[1]
