"""The rule of `convnext_kernels.bench.numerics` as an assertion, and weights under which a wrong kernel shows."""

import zlib

import torch
from torch import Tensor, nn

from convnext_kernels.bench.numerics import judge


def assert_as_good_as_eager(
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    *,
    what: str = "result",
    dtype: torch.dtype | None = None,
    scale: float = 0,
) -> None:
    """Apply the rule; `dtype` sets the epsilon where it is coarser than the result's (autocast), `scale` as there."""
    judgement = judge({what: reference.double()}, {what: eager}, {what: actual}, dtype or eager.dtype, scale=scale)
    assert judgement.within, judgement.reason


def generator(*key: object) -> torch.Generator:
    """Return a random generator that depends on nothing but `key`."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def random_vector(length: int, g: torch.Generator) -> Tensor:
    """Magnitudes from 0.5 to 1.5 with random signs: no element can be left out unseen."""
    magnitude = torch.rand(length, generator=g, dtype=torch.double) + 0.5
    return torch.where(torch.rand(length, generator=g) < 0.5, -magnitude, magnitude)


def random_weight(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Normal, scaled so that a matrix product or a convolution keeps the magnitude of its input."""
    fan_in = max(1, torch.Size(shape[1:]).numel())
    return torch.randn(shape, generator=g, dtype=torch.double) / fan_in**0.5


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give `module` weights of which every one matters, in place.

    A fresh block hides its branch: layer scale is 1e-6, GRN's gamma and beta are 0.
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            g = generator(seed, name)
            vector = p.numel() == max(p.shape)
            value = random_vector(p.numel(), g).view(p.shape) if vector else random_weight(tuple(p.shape), g)
            p.copy_(value)
    return module
