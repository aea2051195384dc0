"""What PyTorch's FLOP counter counts for our ops: as much as for eager modules of the same shapes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnext_kernels import FusedConvNeXtBlock, nn, use_backend
from convnext_kernels.bench import workloads
from convnext_kernels.ops import flops  # noqa: F401

CASES = {
    "dwconv": lambda: workloads.op("dwconv", 2, 8, 14, 14, 7),
    "dwconv, a rectangle with stride": lambda: workloads.op("dwconv", 2, 8, 14, 13, (3, 5), 1, 2),
    "mlp": lambda: workloads.op("mlp", 2, 8, 7, 5, True),
    "block": lambda: workloads.op("block", 2, 8, 7, 5, False),
    "downsample": lambda: workloads.op("downsample", 2, 8, 7, 9, 2),
    "layernorm": lambda: workloads.op("layernorm", 2, 8, 7, 9),
    "grn": lambda: workloads.op("grn", 2, 8, 7, 9),
}


def counted(module, inputs, backward=False):
    inputs = [x.clone().requires_grad_(backward) for x in inputs]
    with use_backend("eager"), FlopCounterMode(display=False) as counter:
        out = module(*inputs)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("op", CASES)
def test_counts_what_eager_counts(op):
    workload = CASES[op]()
    expected = counted(workload.eager, workload.inputs)
    assert counted(workload.ours, workload.inputs) == expected
    assert (expected > 0) == (op not in ("layernorm", "grn"))
    # Two products more. PyTorch counts the weight gradient of a grouped convolution once for every group.
    assert counted(workload.ours, workload.inputs, backward=True) == 3 * expected


def test_shapes_alone_are_enough():
    with torch.device("meta"):
        block, x = FusedConvNeXtBlock(8), torch.empty(2, 8, 5, 6)
        between, y = nn.PatchDownsample2d(8, 12, 2), torch.empty(2, 8, 5, 6)
    with FlopCounterMode(display=False) as counter:
        assert between(block(x) + y).shape == (2, 12, 2, 3)
    assert counter.get_total_flops() == 2 * (2 * 8 * 5 * 6) * (49 + 8 * 8) + 2 * (2 * 12 * 2 * 3) * 8 * 4
