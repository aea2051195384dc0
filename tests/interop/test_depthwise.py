"""Large depthwise convolutions that belong to no block that is known."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck


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
    row = ck.accelerate(nn.Conv2d(6, 6, (1, 11), padding=(0, 5), groups=6))
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
