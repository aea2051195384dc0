"""The least work of a case, the measured ceilings of this machine, and which share of them a time reaches.

FLOPs are 2 x the multiply-adds of convolutions and matmuls, without normalisation, GELU and sums, as
`torch.utils.flop_counter` counts them, on shapes alone, but without taps outside the image, which a kernel may skip.
The ConvNeXt papers publish multiply-adds. Bytes are the least traffic between memory and chip, with everything else
kept on the chip: input and output activations once, parameters once.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_kernels.bench.candidates import DTYPES, tf32
from convnext_kernels.bench.results import Record
from convnext_kernels.bench.timing import fastest, pinned
from convnext_kernels.dispatch import cpu_extension

SECONDS = 0.15  # for each rate
SIDES = (512, 1536)  # of the square matrices that PyTorch multiplies; the small ones are done between other processes
CUDA_SIDES = (8192,)
COPY_BYTES = 2**30  # of a GPU copy, read and written together


@dataclass(frozen=True)
class Work:
    """The least work of one call. Fields without `flops` in their names count elements."""

    flops: int
    vector_flops: int  # part of `flops`: depthwise convolutions, which matrix units do not compute
    x: int  # the input, which a backward pass reads again
    others: int  # other activations read and written
    parameters: int

    def bytes(self, element: int) -> int:
        """Least bytes, with `element` bytes per element."""
        return element * (self.x + self.others + self.parameters)

    def training(self) -> "Work":
        """Forward and backward: the backward pass has two matmuls, dgrad and wgrad, for each of the forward pass.

        It writes the gradients of what the forward pass reads, reads the gradients of what that writes, and reads x
        again. Parameters are read twice and their gradients written.
        """
        return Work(3 * self.flops, 3 * self.vector_flops, self.x, 2 * (self.x + self.others), 3 * self.parameters)


def taps_inside(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Taps inside the image, along one axis, of all outputs."""
    places = (i * stride - padding + tap * dilation for i in range(out) for tap in range(kernel))
    return sum(0 <= place < size for place in places)


def count(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """Count a forward pass of `module` with `inputs`; the first one is x."""
    meta = copy.deepcopy(module).to("meta").eval()
    inputs = [x.detach().to("meta") for x in inputs]
    vector, padding = [], []

    def watch(conv: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        if conv.groups == conv.in_channels == conv.out_channels:
            sides = zip(arguments[0].shape[2:], y.shape[2:], conv.kernel_size, strict=True)
            steps = zip(conv.stride, conv.padding, conv.dilation, strict=True)
            inside = [taps_inside(*side, *step) for side, step in zip(sides, steps, strict=True)]
            vector.append(2 * y.shape[0] * y.shape[1] * math.prod(inside))
            padding.append(2 * y.numel() * math.prod(conv.kernel_size) - vector[-1])

    for conv in meta.modules():
        if isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            conv.register_forward_hook(watch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = meta(*inputs)
    outputs = y.values() if isinstance(y, dict) else (y,)
    others = sum(t.numel() for t in (*inputs[1:], *outputs))
    parameters = sum(p.numel() for p in meta.parameters())
    return Work(counter.get_total_flops() - sum(padding), sum(vector), inputs[0].numel(), others, parameters)


def _rate(call: Callable[[], object], amount: float, device: str) -> float:
    """`amount` over the time of the fastest call."""
    return amount / fastest(call if device == "cpu" else lambda: (call(), torch.cuda.synchronize()), SECONDS)


def _copy_rate(size: int, device: str) -> float:
    source, target = (torch.empty(size // 2, dtype=torch.int8, device=device) for _ in range(2))
    return _rate(lambda: target.copy_(source), size, device)


def measure(device: str) -> dict[str, object]:
    """Measure the rates of `device` with PyTorch's current number of threads.

    Returns ``flops``: FLOP/s of PyTorch's matmul for each dtype, and "vector": of fp32, which runs outside matrix units
    as depthwise convolutions do; ``memory``: bytes/s of PyTorch's copies, both ways together, for each level, with
    the largest working set of that level.
    """
    with pinned() if device == "cpu" else nullcontext():
        return _rates(device)


def _rates(device: str) -> dict[str, object]:
    dtypes, sides = (("fp32", "bf16"), SIDES) if device == "cpu" else (("fp32", "tf32", "bf16", "fp16"), CUDA_SIDES)
    flops = dict.fromkeys(dtypes, 0.0)
    for dtype, side in itertools.product(dtypes, sides):
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        with tf32(dtype == "tf32"):
            rate = _rate(lambda a=a, b=b: a @ b, 2 * side**3, device)
        flops[dtype] = max(flops[dtype], rate)
    flops["vector"] = flops["fp32"]
    if device == "cuda":
        levels = [("memory", None, COPY_BYTES)]
    else:
        extension, threads = cpu_extension(), torch.get_num_threads()
        l2, l3 = (extension.cache_bytes(level) if extension else 0 for level in (2, 3))
        levels = [("L2", l2 * threads, l2 * threads // 2)] if l2 else []  # half of it, so that the copies stay in it
        levels += [("L3", l3, l3 // 2)] if l3 > 2 * l2 * threads else []
        levels.append(("memory", None, max(2**28, 2 * l3)))
    memory = [{"level": name, "size": most, "rate": _copy_rate(size, device)} for name, most, size in levels]
    return {"flops": flops, "memory": memory}


def shares(record: Record, ceilings: dict[str, object]) -> tuple[float | None, float | None]:
    """The shares of the arithmetic and of the memory ceilings that a record with times reaches; None if unknown.

    Depthwise convolutions are compared with the vector ceiling, because they contain no matmul. The memory ceiling is
    that of the smallest level that holds the least bytes.
    """
    rates, seconds = ceilings.get("flops", {}), record.times.median / 1e3
    compute = None
    if record.flops and record.vector_flops is not None and record.dtype in rates:
        matrix = (record.flops - record.vector_flops) / rates[record.dtype]
        compute = (matrix + record.vector_flops / rates["vector"]) / seconds
    levels = [m["rate"] for m in ceilings.get("memory", []) if m["size"] is None or record.bytes <= m["size"]]
    return compute, record.bytes / levels[0] / seconds if levels else None
