"""RepLKNet's scripts with the drop-in class, and the merging of branches."""

import importlib

import pytest
import torch
from torch import nn

from convnext_kernels import compat
from convnext_kernels.compat import DepthWiseConv2dImplicitGEMM
from tests.tolerance import randomize_


# How RepLKNet, UniRepLKNet and SLaK make their convolutions (get_conv2d in their files), in this test's own words.
def test_scripts_find_the_class(monkeypatch):
    monkeypatch.syspath_prepend(compat.FOLDER)  # os.environ["LARGE_KERNEL_CONV_IMPL"]
    found = importlib.import_module("depthwise_conv2d_implicit_gemm").DepthWiseConv2dImplicitGEMM
    assert found is DepthWiseConv2dImplicitGEMM
    for kernel, bias in ((31, False), ((13, 13), True), ((51, 5), False)):
        conv = found(8, kernel, bias=bias)
        assert conv.weight.shape == (8, 1, *(kernel if isinstance(kernel, tuple) else (kernel, kernel)))
        assert (conv.bias is not None) == bias
        assert conv(torch.randn(1, 8, 9, 6)).shape == (1, 8, 9, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_the_convolution(dtype):
    ours = randomize_(DepthWiseConv2dImplicitGEMM(8, (5, 13), bias=True)).to(dtype)
    theirs = nn.Conv2d(8, 8, (5, 13), padding=(2, 6), groups=8).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 9, 14, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=2e-2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


def conv_bn(kernel):
    padding = tuple(side // 2 for side in kernel)
    pair = nn.Sequential()
    pair.add_module("conv", nn.Conv2d(6, 6, kernel, padding=padding, groups=6, bias=False))
    pair.add_module("bn", nn.BatchNorm2d(6))
    pair.bn.running_mean.normal_()
    pair.bn.running_var.uniform_(0.5, 2)
    return randomize_(pair)


class Reparam(nn.Module):
    """What RepLKNet's ReparamLargeKernelConv consists of."""

    def __init__(self):
        super().__init__()
        self.lkb_origin, self.small_conv = conv_bn((13, 13)), conv_bn((5, 5))

    def forward(self, x):
        return self.lkb_reparam(x) if hasattr(self, "lkb_reparam") else self.lkb_origin(x) + self.small_conv(x)


def test_merge():
    model = nn.Sequential(Reparam(), conv_bn((5, 13)), nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))).eval()
    x = torch.randn(2, 6, 15, 14)
    with torch.no_grad():
        expected = model(x)
        assert compat.merge(model) is model
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    kinds = [type(m).__name__ for m in model.modules() if not list(m.children())]
    assert kinds == ["DepthWiseConv2dImplicitGEMM"] * 2 + ["Conv2d", "BatchNorm2d"]


def test_what_is_wrong_is_named():
    conv, other = (nn.Conv2d(c, c, 5, padding=2, groups=c) for c in (6, 4))
    norm, stateless = nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False)
    for call, kind, words in (
        (lambda: compat.fold_batch_norm(conv, conv), TypeError, "norm: expected a BatchNorm, got Conv2d"),
        (lambda: compat.fold_batch_norm(conv, nn.BatchNorm2d(4)), ValueError, "norm: expected 6 channels, got 4"),
        (lambda: compat.fold_batch_norm(conv, stateless), ValueError, "norm: has no running statistics"),
        (lambda: compat.merge_parallel(conv, other), ValueError, r"convs\[1\]: expected 6 channels, got 4"),
        (lambda: compat.merge(nn.Sequential(norm)), ValueError, "model: is in training"),
        (lambda: DepthWiseConv2dImplicitGEMM(6, 4), ValueError, "kernel_size: expected"),
    ):
        with pytest.raises(kind, match=words):
            call()
