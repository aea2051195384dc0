"""Large depthwise convolutions that belong to no block that is known."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.interop.adapter import Adapter

SERVED = {
    "InceptionNeXt's row": {"kernel_size": (1, 11), "padding": (0, 5)},
    "InceptionNeXt's column": {"kernel_size": (11, 1), "padding": "same"},
    "SLaK": {"kernel_size": (13, 5), "padding": (6, 2), "bias": False},
    "VAN, dilated": {"kernel_size": 7, "padding": 9, "dilation": 3},
    "strided": {"kernel_size": 7, "padding": 3, "stride": 2},
}
REFUSED = {  # arguments: words of the reason
    "stride 3": ({"kernel_size": 7, "padding": 3, "stride": 3}, "stride (3, 3)"),
    "stride of one axis": ({"kernel_size": 7, "padding": 3, "stride": (1, 2)}, "stride (1, 2)"),
    "even kernel": ({"kernel_size": 8, "padding": 4}, "kernel size (8, 8)"),
    "no padding": ({"kernel_size": 7}, "does not keep the size"),
    "padding with pixels": ({"kernel_size": 7, "padding": 3, "padding_mode": "reflect"}, "'reflect'"),
    "twice the channels": ({"kernel_size": 7, "padding": 3, "out_channels": 12}, "6 -> 12"),
}


def layer(out_channels=6, **options):
    return nn.Conv2d(6, out_channels, groups=6, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_values_and_gradients(name, dtype):
    original = layer(**SERVED[name]).to(dtype)
    accelerated = ck.accelerate(copy.deepcopy(original))
    assert isinstance(accelerated, Adapter)
    data, results = torch.randn(2, 6, 12, 9, dtype=dtype), []
    for module in (original, accelerated):
        x = data.clone().requires_grad_()
        y = module(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert type(ck.restore(accelerated)) is nn.Conv2d


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    options, words = REFUSED[name]
    (row,) = ck.acceleration_report(layer(**options)).rows
    assert not row.replaced
    assert words in row.reason


def test_a_network_with_them():
    """Hooks on the layer itself, graphs of torch.fx and of torch.compile, exported operators."""
    timm = pytest.importorskip("timm")
    original = timm.create_model("inception_next_atto", num_classes=5).eval()
    for parameter in original.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1)
    accelerated = ck.accelerate(copy.deepcopy(original))
    report = ck.acceleration_report(accelerated)
    assert report.replaced == len(report.rows) == 2 * sum(len(stage.blocks) for stage in original.stages)
    x, seen = torch.randn(1, 3, 64, 64), []
    accelerated.stages[0].blocks[0].token_mixer.dwconv_w.register_forward_hook(lambda *a: seen.append(a))
    with torch.no_grad():
        expected = original(x)
        torch.testing.assert_close(accelerated(x), expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == 1
        exported = torch.export.export(accelerated, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


def test_small_calls_stay_pytorchs(monkeypatch):
    """On a CPU in fp32 inference, where the kernel gains less than its call takes; not with a backend by name."""
    called = []
    ours = ck.functional.depthwise_conv2d
    monkeypatch.setattr(ck.functional, "depthwise_conv2d", lambda *a, **k: called.append(1) or ours(*a, **k))
    row = ck.accelerate(layer(kernel_size=(1, 11), padding=(0, 5)))
    small, large = torch.randn(1, 6, 14, 14), torch.randn(1, 6, 130, 130)
    for x, backend, grad, calls in (
        (small, "auto", False, 0),
        (large, "auto", False, 1),
        (small, "auto", True, 1),
        (small, "eager", False, 1),
        (small.bfloat16(), "auto", False, 1),
    ):
        ck.accelerate(row, backend=backend)
        with torch.set_grad_enabled(grad):
            row.to(x.dtype)(x)
        assert len(called) == calls
        called.clear()
