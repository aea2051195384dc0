"""Multiply-adds and parameters of a network, without running it."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_kernels.ops import flops  # noqa: F401  registers the FLOP formulas of this package's ops


class Count(NamedTuple):
    """The cost of a network for one image."""

    multiply_adds: int  # of convolutions and matrix products, as the ConvNeXt papers count
    parameters: int


def count(model: nn.Module, size: int = 224, in_chans: int = 3) -> Count:
    """Count `model` for one image of `size` x `size`, on the meta device; `model` may be on any device."""
    meta = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, in_chans, size, size, device="meta"))
    return Count(counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))
