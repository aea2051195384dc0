"""The measured ceilings of this machine, arithmetic and memory rates: the roofs of the roofline."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from convnext_kernels.bench.timing import pinned

if TYPE_CHECKING:
    from torch import Tensor

    from convnext_kernels.bench.work import Work

SECONDS = 0.15  # for each rate
SIDE = 1536  # of the square matrices that PyTorch multiplies on a CPU
CUDA_SIDE = 8192
COPY_BYTES = 2**30  # of a GPU copy, read and written together


def _rate(call: Callable[[], object], amount: float) -> float:
    """`amount` over the time of the fastest call, after a warm-up call."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return amount / best


def _matmul(dtype: str, side: int, device: str) -> "Callable[[], Tensor]":
    import torch

    from convnext_kernels.bench.candidates import DTYPES, tf32

    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))

    def call() -> "Tensor":
        with tf32(dtype == "tf32"):
            y = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    return call


def _copy(count: int, device: str) -> float:
    """Bytes per second of PyTorch's copy of `count` bytes, read and written."""
    import torch

    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return _rate(copy, 2 * count)


KINDS = {  # of loops in the extension: the ceiling, and how it was measured
    "fma_fp32": ("fp32", "fp32 multiply-adds in registers"),
    "dot_bf16": ("bf16", "bf16 dot products (VDPBF16PS) in registers"),
    "tile_bf16": ("bf16", "bf16 AMX tile products in registers"),
}


def measure(device: str) -> dict[str, object]:
    """Measure the rates of `device` with PyTorch's current number of threads.

    Returns ``flops``: FLOP/s of matmuls for each dtype, the better of PyTorch's matmul and our own loop, and
    "vector": FLOP/s of fp32 multiply-adds outside matrix units; ``memory``: bytes/s of copies for each level, with
    the largest working set of that level; ``sources``: how each rate was measured.
    """
    with pinned() if device == "cpu" else nullcontext():
        return _measure(device)


def _measure(device: str) -> dict[str, object]:
    import torch

    from convnext_kernels.backends.cpu import native

    dtypes, side = (("fp32", "bf16"), SIDE) if device == "cpu" else (("fp32", "tf32", "bf16", "fp16"), CUDA_SIDE)
    flops = {dtype: _rate(_matmul(dtype, side, device), 2 * side**3) for dtype in dtypes}
    sources = dict.fromkeys(flops, f"PyTorch's {side}x{side}x{side} matmul")
    # fp32 matmuls without TF32 run on the ordinary multiply-add units, which depthwise convolutions use too.
    flops["vector"], sources["vector"] = flops["fp32"], sources["fp32"]
    if device == "cuda" or native.import_error():
        size = COPY_BYTES // 2 if device == "cuda" else 2**27
        sources["memory"] = f"PyTorch's copy of {size // 2**20} MiB, bytes read plus bytes written"
        sources["memory"] += "; no cache levels, because the compiled extension is missing" if device == "cpu" else ""
        rate = _copy(size, device)
        return {"flops": flops, "memory": [{"level": "memory", "size": None, "rate": rate}], "sources": sources}

    extension, threads = native.extension(), torch.get_num_threads()
    for kind in extension.arithmetic_kinds():
        dtype, label = KINDS[kind]
        rate = extension.arithmetic_rate(kind, threads, SECONDS)
        if kind == "fma_fp32":
            flops["vector"], sources["vector"] = rate, label
        if rate > flops[dtype]:
            flops[dtype], sources[dtype] = rate, label
    # Half of L2, so that the copies stay in it; half of each thread's part of L3, unless that lies in L2.
    l2, l3 = (extension.cache_bytes(level) for level in (2, 3))
    levels = [("L2", l2 * threads, l2 // 2)] if l2 else []
    levels += [("L3", l3, l3 // threads // 2)] if l3 // threads // 2 > l2 else []
    levels.append(("memory", None, max(2**27, 2 * l3) // threads))
    memory = [{"level": n, "size": size, "rate": extension.copy_rate(p, threads, SECONDS)} for n, size, p in levels]
    sources["memory"] = "copies by all threads, bytes read plus bytes written"
    return {"flops": flops, "memory": memory, "sources": sources}


def shares(work: "Work", element: int, dtype: str, seconds: float, ceilings: dict[str, object]) -> tuple:
    """Return the shares of the arithmetic ceilings and of the memory ceiling that `work` in `seconds` reaches.

    Depthwise convolutions are compared with the vector ceiling, because they contain no matmul, and without the taps
    outside the image. The memory ceiling is that of the smallest level that holds the least bytes. A share is None if
    its ceiling is unknown.
    """
    flops = ceilings.get("flops", {})
    compute = None
    if work.flops and dtype in flops and "vector" in flops:
        vector = work.depthwise_flops - work.padding_flops
        least = vector / flops["vector"] + (work.flops - work.depthwise_flops) / flops[dtype]
        compute = least / seconds
    moved = work.bytes(element)
    rates = [m["rate"] for m in ceilings.get("memory", []) if m["size"] is None or moved <= m["size"]]
    return compute, moved / rates[0] / seconds if rates else None
