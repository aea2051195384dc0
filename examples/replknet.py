"""A RepLKNet stage (arXiv 2203.06717) with the drop-in op: trained with two branches, merged into one kernel.

python examples/replknet.py

RepLKNet's, UniRepLKNet's and SLaK's own scripts find the same class without a change (docs/api.md).
"""

import torch
from torch import Tensor, nn

from convnext_kernels.compat import DepthWiseConv2dImplicitGEMM, merge


def conv_bn(channels: int, kernel: int) -> nn.Sequential:
    """A depthwise convolution and its BatchNorm, under the names that RepLKNet gives them."""
    layers = nn.Sequential()
    layers.add_module("conv", DepthWiseConv2dImplicitGEMM(channels, kernel))
    layers.add_module("bn", nn.BatchNorm2d(channels))
    return layers


class LargeKernel(nn.Module):
    """A large and a small kernel in parallel; `merge` makes one convolution, `lkb_reparam`, of them."""

    def __init__(self, channels: int, large: int = 31, small: int = 5) -> None:
        super().__init__()
        self.lkb_origin, self.small_conv = conv_bn(channels, large), conv_bn(channels, small)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.lkb_reparam(x) if hasattr(self, "lkb_reparam") else self.lkb_origin(x) + self.small_conv(x)


class Block(nn.Module):
    """RepLKNet's block: 1x1 convolution, large kernel, 1x1 convolution, shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prelkb_bn, self.act = nn.BatchNorm2d(channels), nn.ReLU()
        self.pw1, self.pw2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.large_kernel = LargeKernel(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.act(self.pw1(self.prelkb_bn(x)))
        return x + self.pw2(self.act(self.large_kernel(y)))


def main() -> None:
    """Train a stage for a few steps, merge it, and compare."""
    torch.manual_seed(0)
    stage = nn.Sequential(*(Block(32) for _ in range(2))).to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 28, 28).to(memory_format=torch.channels_last)
    target = x.roll(8, dims=3)  # something that needs a large kernel
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    for step in range(10):
        loss = nn.functional.mse_loss(stage(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 3 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    stage.eval()
    with torch.inference_mode():
        two_branches = stage(x)
        merged = merge(stage)(x)
    convolutions = sum(isinstance(m, DepthWiseConv2dImplicitGEMM) for m in stage.modules())
    print(f"merged: {convolutions} depthwise convolutions, differs by {(merged - two_branches).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
