"""What a training loop does: a whole step with loss and optimiser, and a depthwise convolution's weight gradient alone.

A step drops the gradients, runs forward, loss (mean squared error; cross entropy for a model) and backward, and ends
with AdamW(fused=True), PyTorch's fastest AdamW on CPUs. The optimiser is part of it because it changes the weights, so
this package must pack them again in every step. torch.compile gets model and loss in one graph.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels.bench.workloads import Step, Workload

# Results with a larger relative error are not timed. PyTorch's own bf16 gradients of LayerNorm's parameters are up to
# 89 % off in the first stage at batch 8 (sums over 25088 pixels). They are used in practice, so they are timed.
GARBAGE = 2.0


class WithLoss(nn.Module):
    """A model and its loss in one module; autocast leaves fp64 alone."""

    def __init__(self, model: nn.Module, autocast: bool = False) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar."""
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            y = self.model(x)
            return F.mse_loss(y, target) if target.is_floating_point() else F.cross_entropy(y, target)


class TrainingStep(Step):
    """A step that ends with the optimiser's, except in fp64; `gradients` are those before it."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(module, inputs)
        x, target = self.leaves
        x.requires_grad_(target.is_floating_point())  # a model's images need no gradients, unlike a block's input
        target.requires_grad_(False)
        reference = x.dtype == torch.float64
        self.optimiser = None if reference else torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def __call__(self) -> Tensor:
        """Run one step and return the loss."""
        loss = super().__call__()
        if self.optimiser is not None:
            self.optimiser.step()
        return loss.detach()


class Gradient(nn.Module):
    """The gradients of a depthwise convolution's weight and bias as an operator: PyTorch's, or ours."""

    def __init__(self, conv: nn.Module, ours: bool) -> None:
        super().__init__()
        self.conv, self.ours = conv, ours

    def forward(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """The gradients by name."""
        weight, bias, needs = self.conv.weight, self.conv.bias, [False, True, True]
        c, k, axes = x.shape[1], weight.shape[-1], x.dim() - 2
        if x.is_meta:  # to be counted: FlopCounterMode does not know groups in a backward pass
            return {"y": self.conv(x)}
        if x.dtype == torch.float64:  # the reference, whose convolution goes through FFTs
            with torch.inference_mode(False), torch.enable_grad():
                found = torch.autograd.grad(self.conv(x), (weight, bias), dy)
        elif self.ours and axes == 3:
            found = torch.ops.convnext_kernels.dwconv3d_backward(dy, x, weight, bias, 1, needs, "auto")
        elif self.ours:
            found = torch.ops.convnext_kernels.dwconv_backward(dy, x, weight, bias, 1, 1, 1, needs, "auto")
        else:
            form = ([c], [1] * axes, [k // 2] * axes, [1] * axes, False, [0] * axes, c, needs)
            found = torch.ops.aten.convolution_backward(dy, x, weight, *form)[1:]
        return dict(zip(("gradient of weight", "gradient of bias"), found, strict=True))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))


def weight_gradient(build: Callable[[], Workload]) -> Workload:
    """The gradients of a depthwise convolution's parameters, instead of the convolution that `build` returns."""
    plain = build()
    (x,) = plain.inputs
    return Workload(Gradient(plain.eager, False), Gradient(plain.ours, True), (x, _like(x)), garbage=GARBAGE)


def step(build: Callable[[], Workload], model: bool, autocast: bool = False) -> Workload:
    """A training step of what `build` returns: of a model, whose target are classes, or of a block (another image)."""
    plain = build()
    (x,) = plain.inputs
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(1000, (len(x),), generator=generator) if model else _like(x)
    eager, ours = WithLoss(plain.eager, autocast), WithLoss(plain.ours, autocast)
    return Workload(eager, ours, (x, target), autocast, TrainingStep, GARBAGE)
