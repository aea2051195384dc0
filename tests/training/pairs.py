"""Models of other libraries and the same accelerated: what is trained in these tests."""

import copy

import torch
from torch import Tensor, nn

import convnext_kernels
from tests.interop import helpers as interop

MODELS = ("torchvision", "timm-v1", "timm-v2")


def pair(name: str, backend: str = "auto", memory: str = "auto") -> tuple[nn.Module, nn.Module]:
    """(a small network of another library in training mode, the same accelerated), weights that all matter."""
    plain = interop.MODELS[name].make(dtype=torch.float32).train()
    return plain, convnext_kernels.accelerate(copy.deepcopy(plain), memory=memory, backend=backend)


def pictures(batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets of five classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(5, (batch,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
