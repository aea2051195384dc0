"""Host time: how long a call keeps Python busy before it returns. On a GPU that is the time before its work can start.

The unit is the time of ten ``torch.add`` of one element on the CPU, because machines differ. Times are minima: other
processes only add to them. On a CPU the calls compute too, so they get one pixel.
"""

from functools import partial

import torch
from torch import Tensor, nn

from convnext_kernels.bench.timing import fastest
from convnext_kernels.bench.workloads import initialise, network, plain
from convnext_kernels.nn import FusedConvNeXtBlock

SECONDS = 0.3  # for each figure
BURST = 10  # calls of a block without waiting for the GPU: their launches must fit into its queue (1024)
KINDS = ("block V1", "block V2", "ConvNeXt-T")


def unit() -> float:
    """Seconds of ten ``torch.add`` of one element."""
    a, b = torch.zeros(1), torch.zeros(1)
    return fastest(lambda: [torch.add(a, b) for _ in range(10)], SECONDS, 10)


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
    calls, wait = 1 if kind == "ConvNeXt-T" else BURST, torch.cuda.synchronize if device == "cuda" else lambda: None
    found = {}
    for name, module in zip(("ours", "eager"), _pair(kind), strict=True):
        module = module.to(device, dtype)
        call = partial(module, x)
        if training:
            inputs = [x.clone().requires_grad_(), *module.parameters()]
            call = partial(_step, module, inputs, torch.zeros_like(module(inputs[0])))
        with torch.inference_mode(not training):
            found[name] = fastest(call, SECONDS, calls, wait)
    return found


def _step(module: nn.Module, inputs: list[Tensor], dy: Tensor) -> None:
    torch.autograd.grad(module(inputs[0]), inputs, dy)
