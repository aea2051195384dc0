"""The least work of a case: floating-point operations and bytes, counted by running its module on shapes alone.

FLOPs are 2 x the multiply-adds of convolutions and matmuls, without normalisation, GELU and sums, as
`torch.utils.flop_counter` counts them. The ConvNeXt papers publish multiply-adds. Bytes are the least traffic between
memory and chip, with everything else kept on the chip: input and output activations once, parameters once.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Work:
    """The least work of one call. Fields without `flops` in their names count elements."""

    flops: int
    depthwise_flops: int  # part of `flops`
    x: int  # the input, which a backward pass reads again
    others: int  # other activations read and written
    parameters: int
    padding_flops: int = 0  # part of `depthwise_flops`: taps outside the image, which a kernel may skip

    def bytes(self, element: int) -> int:
        """Least bytes, with `element` bytes per element."""
        return element * (self.x + self.others + self.parameters)

    def training(self) -> "Work":
        """Forward and backward: the backward pass has two matmuls, dgrad and wgrad, for each of the forward pass.

        It writes the gradients of what the forward pass reads, reads the gradients of what that writes, and reads x
        again. Parameters are read twice and their gradients written.
        """
        flops = (3 * self.flops, 3 * self.depthwise_flops)
        return Work(*flops, self.x, 2 * (self.x + self.others), 3 * self.parameters, 3 * self.padding_flops)


def _inside(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Taps inside the image, along one axis, of all outputs."""
    places = (i * stride - padding + tap * dilation for i in range(out) for tap in range(kernel))
    return sum(0 <= place < size for place in places)


def count(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """Count a forward pass of `module` with `inputs`; the first one is x."""
    meta = copy.deepcopy(module).to("meta").eval()
    inputs = [x.detach().to("meta") for x in inputs]
    depthwise, padding = [0], [0]

    def watch(conv: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        if conv.groups == conv.in_channels == conv.out_channels:
            sides = zip(arguments[0].shape[2:], y.shape[2:], conv.kernel_size, strict=True)
            steps = zip(conv.stride, conv.padding, conv.dilation, strict=True)
            inside = [_inside(*side, *step) for side, step in zip(sides, steps, strict=True)]
            flops = 2 * y.numel() * math.prod(conv.kernel_size)
            depthwise[0] += flops
            padding[0] += flops - 2 * y.shape[0] * y.shape[1] * math.prod(inside)

    for conv in meta.modules():
        if isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            conv.register_forward_hook(watch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = meta(*inputs)
    others = sum(x.numel() for x in inputs[1:]) + y.numel()
    parameters = sum(p.numel() for p in meta.parameters())
    return Work(counter.get_total_flops(), depthwise[0], inputs[0].numel(), others, parameters, padding[0])
