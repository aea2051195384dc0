import pytest
import torch

from convnext_kernels.bench import ceilings as work
from convnext_kernels.bench import workloads

N, C, SIZE = 2, 24, 10
PIXELS = N * SIZE * SIZE


def counted(workload):
    return work.count(workload.eager, workload.inputs)


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
    assert found.flops == found.depthwise_flops == 2 * N * C * outputs * kernel**2
    assert found.flops - found.padding_flops == 2 * N * C * inside
    assert (found.x, found.others) == (N * C * size**2, N * C * outputs)
    assert found.parameters == C * (kernel**2 + 1)


def test_volumes():
    found = counted(workloads.op("dwconv3d", 1, C, 9, 9, 3, 9))
    assert found.flops == 2 * C * 9**3 * 27
    assert found.flops - found.padding_flops == 2 * C * (3 * 9 - 2) ** 3


@pytest.mark.parametrize("use_grn", [False, True])
def test_bottleneck_and_block(use_grn):
    mlp, block = (counted(workloads.op(name, N, C, SIZE, SIZE, use_grn)) for name in ("mlp", "block"))
    assert (mlp.flops, mlp.depthwise_flops) == (16 * PIXELS * C * C, 0)
    assert mlp.bytes(4) == 4 * (3 * PIXELS * C + mlp.parameters)  # x, the residual and the output
    assert mlp.parameters == 8 * C * C + (15 if use_grn else 8) * C
    dwconv = counted(workloads.op("dwconv", N, C, SIZE, SIZE, 7))
    assert block.flops == mlp.flops + dwconv.flops
    assert block.padding_flops == dwconv.padding_flops > 0
    assert block.others == PIXELS * C
    line = counted(workloads.op("block1d", N, C, 1, SIZE, use_grn))
    assert line.flops == N * SIZE * (16 * C * C + 2 * 7 * C)
    assert counted(workloads.op("layernorm", N, C, SIZE, SIZE)) == work.Work(0, 0, PIXELS * C, PIXELS * C, 2 * C)


@pytest.mark.parametrize(
    ("name", "printed", "millions"),
    [("convnext_tiny", 4.5, 29), ("convnext_small", 8.7, 50), ("convnext_base", 15.4, 89)],
)
def test_the_papers_figures(name, printed, millions):
    """Multiply-adds at 224, arXiv 2201.03545 table 1."""
    pytest.importorskip("torchvision")
    found = work.count(workloads._load("torchvision", name), [torch.empty(1, 3, 224, 224)])
    assert found.flops / 2e9 == pytest.approx(printed, abs=0.05)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.5)
    assert 0 < found.padding_flops < found.depthwise_flops < found.flops


def test_training_moves_every_tensor_once_a_pass():
    found = counted(workloads.op("dwconv", N, C, SIZE, SIZE, 3))
    # x read, y written; dy and x read, dx written; weights read twice, gradients written
    assert found.training().bytes(1) == 5 * PIXELS * C + 3 * C * 10
    assert found.training().flops == 3 * found.flops
