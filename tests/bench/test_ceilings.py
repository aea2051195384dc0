import math

import pytest
import torch

from convnext_kernels.bench import ceilings, workloads
from convnext_kernels.bench.ceilings import Work
from convnext_kernels.bench.results import Record, Times

N, C, SIZE = 2, 24, 10
PIXELS = N * SIZE * SIZE


def test_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.005)
    monkeypatch.setattr(ceilings, "SIDES", (64,))
    found = ceilings.measure("cpu")
    assert set(found["flops"]) == {"fp32", "bf16", "vector"}
    rates = [*found["flops"].values(), *(level["rate"] for level in found["memory"])]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    sizes = [level["size"] for level in found["memory"]]
    assert sizes[-1] is None
    assert sizes[:-1] == sorted(sizes[:-1])


CEILINGS = {
    "flops": {"bf16": 4e12, "vector": 1e12},
    "memory": [{"level": "L2", "size": 1000, "rate": 1e12}, {"level": "memory", "size": None, "rate": 1e10}],
}


def record(**values):
    times = {"times": Times(((4.0,),))}
    return Record(*("block/x", "block", "x", 1, "bf16", "forward", "ours", "ok"), **times | values)


def test_shares():
    work = {"flops": 5 * 10**9, "vector_flops": 10**9}
    compute, memory = ceilings.shares(record(**work, bytes=500), CEILINGS)
    assert compute == pytest.approx((1e-3 + 1e-3) / 4e-3)
    assert memory == pytest.approx(500 / 1e12 / 4e-3)
    assert ceilings.shares(record(**work, bytes=2000), CEILINGS)[1] == pytest.approx(2000 / 1e10 / 4e-3)
    assert ceilings.shares(record(**work), {}) == (None, None)
    assert ceilings.shares(record(), CEILINGS)[0] is None  # LayerNorm


def counted(workload):
    return ceilings.count(workload.eager, workload.inputs)


def taps(size, kernel, stride=1, dilation=1):
    """Those inside the image, one by one."""
    ones = torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel)
    y = torch.nn.functional.conv2d(*ones, padding=dilation * (kernel // 2), stride=stride, dilation=dilation)
    return int(y.sum()), y.numel()


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "stride"), [(5, 3, 1, 1), (7, 31, 1, 1), (14, 7, 1, 2), (6, 1, 1, 1), (9, 5, 2, 1)]
)
def test_depthwise_convolutions(size, kernel, dilation, stride):
    found = counted(workloads.op("dwconv", N, C, size, size, kernel, dilation, stride))
    inside, outputs = taps(size, kernel, stride, dilation)
    assert found.flops == found.vector_flops == 2 * N * C * inside
    assert (found.x, found.others) == (N * C * size**2, N * C * outputs)
    assert found.parameters == C * (kernel**2 + 1)


@pytest.mark.parametrize("use_grn", [False, True])
def test_bottleneck_and_block(use_grn):
    mlp, block = (counted(workloads.op(name, N, C, SIZE, SIZE, use_grn)) for name in ("mlp", "block"))
    assert (mlp.flops, mlp.vector_flops) == (16 * PIXELS * C * C, 0)
    assert mlp.bytes(4) == 4 * (3 * PIXELS * C + mlp.parameters)  # x, the residual and the output
    assert mlp.parameters == 8 * C * C + (15 if use_grn else 8) * C
    dwconv = counted(workloads.op("dwconv", N, C, SIZE, SIZE, 7))
    assert block.flops == mlp.flops + dwconv.flops
    assert block.others == PIXELS * C
    line = counted(workloads.op("block1d", N, C, 1, SIZE, use_grn))
    assert line.flops == N * SIZE * 16 * C * C + 2 * N * C * (7 * SIZE - 12)  # 12 taps outside
    assert counted(workloads.op("layernorm", N, C, SIZE, SIZE)) == Work(0, 0, PIXELS * C, PIXELS * C, 2 * C)
