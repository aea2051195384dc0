"""The measured ceilings of this machine, arithmetic and memory rates: the roofs of the roofline."""

import time
from collections.abc import Callable
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


def _cpu() -> dict[str, object]:
    import torch

    from convnext_kernels.backends.cpu import native

    threads = torch.get_num_threads()
    flops, sources, memory = {}, {}, []
    for dtype in ("fp32", "bf16"):
        flops[dtype] = _rate(_matmul(dtype, SIDE, "cpu"), 2 * SIDE**3)
        sources[dtype] = f"PyTorch's {SIDE}x{SIDE}x{SIDE} matmul"
    if native.import_error():
        flops["vector"], sources["vector"] = flops["fp32"], sources["fp32"]
        source = torch.empty(2**25)  # 128 MiB
        target = torch.empty_like(source)
        rate = _rate(lambda: target.copy_(source), 2 * source.numel() * 4)
        memory.append({"level": "memory", "size": None, "rate": rate})
        sources["memory"] = "PyTorch's copy of 128 MiB; no cache levels, because the compiled extension is missing"
        return {"flops": flops, "memory": memory, "sources": sources}

    extension = native.extension()
    for kind in extension.arithmetic_kinds():
        dtype, label = {
            "fma_fp32": ("fp32", "fp32 multiply-adds in registers"),
            "dot_bf16": ("bf16", "bf16 dot products (VDPBF16PS) in registers"),
            "tile_bf16": ("bf16", "bf16 AMX tile products in registers"),
        }[kind]
        rate = extension.arithmetic_rate(kind, threads, SECONDS)
        if kind == "fma_fp32":
            flops["vector"], sources["vector"] = rate, label
        if rate > flops[dtype]:
            flops[dtype], sources[dtype] = rate, label
    # Half of L2, so that the copies stay in it; half of each thread's part of L3, which is shared.
    sizes = {f"L{level}": extension.cache_bytes(level) for level in (1, 2, 3)}
    parts = {"L2": sizes["L2"] // 2, "L3": sizes["L3"] // threads // 2}
    if parts["L3"] <= sizes["L2"]:  # such a part lies in L2
        parts.pop("L3")
    for level, part in parts.items():
        if part:
            size = sizes[level] * (threads if level == "L2" else 1)
            memory.append({"level": level, "size": size, "rate": extension.copy_rate(part, threads, SECONDS)})
    beyond = max(2**27, 2 * sizes["L3"]) // threads
    memory.append({"level": "memory", "size": None, "rate": extension.copy_rate(beyond, threads, SECONDS)})
    sources["memory"] = "copies by all threads, bytes read plus bytes written"
    return {"flops": flops, "memory": memory, "sources": sources}


def _cuda() -> dict[str, object]:
    import torch

    flops = {d: _rate(_matmul(d, CUDA_SIDE, "cuda"), 2 * CUDA_SIDE**3) for d in ("fp32", "tf32", "bf16", "fp16")}
    sources = dict.fromkeys(flops, f"PyTorch's {CUDA_SIDE}x{CUDA_SIDE}x{CUDA_SIDE} matmul")
    # fp32 matmuls without TF32 run on the ordinary multiply-add units, which depthwise convolutions use too.
    flops["vector"], sources["vector"] = flops["fp32"], sources["fp32"]
    source = torch.empty(COPY_BYTES // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    sources["memory"] = "PyTorch's copy of 512 MiB, bytes read plus bytes written"
    return {
        "flops": flops,
        "memory": [{"level": "memory", "size": None, "rate": _rate(copy, COPY_BYTES)}],
        "sources": sources,
    }


def measure(device: str) -> dict[str, object]:
    """Measure the rates of `device` with PyTorch's current number of threads.

    Returns ``flops``: FLOP/s of matmuls for each dtype, the better of PyTorch's matmul and our own loop, and
    "vector": FLOP/s of fp32 multiply-adds outside matrix units; ``memory``: bytes/s of copies for each level, with
    the largest working set of that level; ``sources``: how each rate was measured.
    """
    if device == "cuda":
        return _cuda()
    with pinned():
        return _cpu()


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
