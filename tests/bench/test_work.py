import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnext_kernels.bench import cases, work, workloads

SHAPE = (2, 24, 10)


def counted(module, *inputs, training=False):
    inputs = [x.requires_grad_(training) for x in inputs]
    with FlopCounterMode(display=False) as counter:
        y = module(*inputs)
        if training:
            y.sum().backward()
    return counter.get_total_flops()


def overcount(n, depths, dims, sides, kernel=7):
    """What PyTorch 2.14 counts beyond: it takes the weight gradient of a grouped convolution for a dense one."""
    return sum(
        depth * (c - 1) * work.dwconv(n, c, side, kernel).flops
        for depth, c, side in zip(depths, dims, sides, strict=True)
    )


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_grn", [False, True])
def test_flops_are_those_of_pytorchs_counter(training, use_grn):
    n, c, size = SHAPE
    rows = [
        (work.dwconv(n, c, size, 5), workloads.EagerDwconv(c, 5), 5),
        (work.mlp(n, c, size, use_grn), workloads.EagerMlp(c, use_grn), 0),
        (work.block(n, c, size, use_grn), workloads.EagerBlock(c, use_grn), 7),
        (work.layernorm(n, c, size), workloads.EagerLayerNorm2d(c), 0),
    ]
    for counts, module, kernel in rows:
        x = torch.randn(n, c, size, size)
        inputs = (x, torch.randn_like(x)) if type(module) is workloads.EagerMlp else (x,)
        counts_now = counts.training() if training else counts
        extra = overcount(n, [1], [c], [size], kernel) if training else 0
        assert counts_now.flops + extra == counted(module, *inputs, training=training), type(module)
        assert counts.parameters == parameters(module), type(module)
        elements = sum(t.numel() for t in (*inputs, x))  # inputs and one output
        assert counts.bytes(4) == 4 * (elements + parameters(module))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("label", ["ConvNeXt-T", "ConvNeXt-V2-T", "ConvNeXt-B"])
def test_whole_models(label, training):
    library, name, depths, dims, grn = cases.CONVNEXTS[label]
    model = workloads._load(library, name)
    counts = work.convnext(2, 64, depths, dims, grn)
    now = counts.training() if training else counts
    extra = overcount(2, depths, dims, (16, 8, 4, 2)) if training else 0
    assert now.flops + extra == counted(model, torch.randn(2, 3, 64, 64), training=training)
    assert counts.parameters == parameters(model)
    assert 0 < counts.depthwise_flops < counts.flops


def test_the_papers_figures():
    """Multiply-adds at 224, arXiv 2201.03545 table 1."""
    for label, printed in (("ConvNeXt-T", 4.5), ("ConvNeXt-S", 8.7), ("ConvNeXt-B", 15.4)):
        *_, depths, dims, grn = cases.CONVNEXTS[label]
        assert work.convnext(1, 224, depths, dims, grn).flops / 2e9 == pytest.approx(printed, abs=0.05)


def test_training_moves_every_tensor_once_a_pass():
    counts = work.dwconv(*SHAPE[:2], SHAPE[2], 3).training()
    n, c, size = SHAPE
    # x read, y written; dy and x read, dx written; weights read twice, gradients written
    assert counts.bytes(1) == 5 * n * c * size * size + 3 * c * 10


def test_a_rival_is_counted_by_pytorch():
    workload = workloads.rival("torchvision", "mobilenet_v2", 3, 64)
    assert workload.work.flops == counted(workload.eager, torch.randn(3, 3, 64, 64))
    assert workload.work.parameters == parameters(workload.eager)
    assert workload.ours is None


@pytest.mark.parametrize(("size", "kernel"), [(5, 3), (7, 31), (14, 7), (1, 5), (6, 1)])
def test_taps_outside_the_image(size, kernel):
    inside = torch.nn.functional.conv2d(
        torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel), padding=kernel // 2
    )
    counts = work.dwconv(3, 4, size, kernel)
    assert counts.flops - counts.padding_flops == 2 * 3 * 4 * inside.sum()
    assert work.block(3, 4, size, kernel=kernel).padding_flops == counts.padding_flops
    assert counts.training().padding_flops == 3 * counts.padding_flops
