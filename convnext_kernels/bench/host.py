"""Host time: how long a call keeps Python busy before it returns. On a GPU that is the time before its work can start.

The unit is the time of ten ``torch.add`` of one element on the CPU, because machines differ. Times are minima: other
processes only add to them. On a CPU the calls compute too, so they get one pixel.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from convnext_kernels.bench.workloads import initialise, network, plain
from convnext_kernels.nn import FusedConvNeXtBlock

SECONDS = 0.3  # for each figure
BURST = 10  # calls of a block without waiting for the GPU: their launches must fit into its queue (1024)
KINDS = ("block V1", "block V2", "ConvNeXt-T")


def minimum(call: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Seconds of a call, of the fastest loop of `calls`."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
        wait()
    return best


def unit() -> float:
    """Seconds of ten ``torch.add`` of one element."""
    a, b = torch.zeros(1), torch.zeros(1)

    return minimum(lambda: [torch.add(a, b) for _ in range(10)], 10)


def _pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """Our module, and the same in plain PyTorch."""
    if kind == "ConvNeXt-T":
        workload = network("convnext_tiny", 1, 32)
        return workload.ours, workload.eager
    block = nn.Sequential(FusedConvNeXtBlock(96, use_grn=kind == "block V2")).eval()
    initialise(block)
    return block, plain(block)


def measure(kind: str, training: bool, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of one call of `kind` at batch 1: this package's ("ours") and plain PyTorch's ("eager")."""
    size = (224 if device == "cuda" else 32) if kind == "ConvNeXt-T" else 56 if device == "cuda" else 1
    shape = (1, 3 if kind == "ConvNeXt-T" else 96, size, size)
    x = torch.zeros(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    found = {}
    for name, module in zip(("ours", "eager"), _pair(kind), strict=True):
        module = module.to(device, dtype)

        def forward(module: nn.Module = module) -> None:
            with torch.inference_mode():
                module(x)

        leaf = x.clone().requires_grad_()
        inputs = [leaf, *module.parameters()]
        dy = torch.zeros_like(module(leaf)) if training else None

        def step(module: nn.Module = module, inputs: list = inputs, dy: torch.Tensor | None = dy) -> None:
            torch.autograd.grad(module(inputs[0]), inputs, dy)

        calls = 1 if kind == "ConvNeXt-T" else BURST
        found[name] = minimum(step if training else forward, calls, device)
    return found
