"""Models of other libraries and the same accelerated: what is trained in these tests."""

import copy
from collections.abc import Callable

import torch
import torchvision
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

import convnext_kernels
from tests.tolerance import randomize_


def _torchvision(drop_path: float = 0.0) -> nn.Module:
    setting = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return torchvision.models.ConvNeXt(setting, stochastic_depth_prob=drop_path, num_classes=5)


def _timm_v1(drop_path: float = 0.0) -> nn.Module:
    return TimmConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5, drop_path_rate=drop_path)


def _timm_v2(drop_path: float = 0.0) -> nn.Module:
    options = {"use_grn": True, "ls_init_value": None, "conv_mlp": True}
    return TimmConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5, drop_path_rate=drop_path, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {"torchvision": _torchvision, "timm V1": _timm_v1, "timm V2": _timm_v2}


def pair(name: str, backend: str = "auto", memory: str = "auto", **options: float) -> tuple[nn.Module, nn.Module]:
    """(a small network of another library in training mode, the same accelerated), weights that all matter."""
    plain = randomize_(MODELS[name](**options)).train()
    return plain, convnext_kernels.accelerate(copy.deepcopy(plain), memory=memory, backend=backend)


def pictures(batch: int = 4, seed: int = 0, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor]:
    """Inputs and targets of five classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(5, (batch,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; parameters without one are left out."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-4) -> None:
    """Each within `tolerance` of its largest element."""
    ours, theirs = gradients(actual), gradients(expected)
    assert list(ours) == list(theirs)
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(
            gradient, theirs[name], rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
