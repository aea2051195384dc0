"""RepLKNet's scripts with the drop-in class, and the merging of branches."""

import importlib

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
