"""The one tolerance rule of the tests, and the weights that make a wrong kernel visible under it.

The rule: against an fp64 reference, the error of a result is at most twice the error that plain PyTorch makes in
the same dtype, plus a floor. It is asked of the largest error and of the root mean square error; the second
catches what is wrong a little everywhere (an approximate GELU, sums in bf16), the first what is wrong in one place.

The floor is ``FLOOR[dtype] * eps(dtype) * scale`` where scale is the reference's largest (or root mean square)
magnitude. A 16-bit result is rounded once at the end, half an eps, and whatever a kernel does before is done in
fp32: one eps. An fp32 kernel may sum in another order and use its own polynomial for erf (5e-7): eight eps, 1e-6.
"""

import zlib

import torch
from torch import Tensor, nn

FLOOR = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def _errors(t: Tensor, reference: Tensor, judged: Tensor) -> tuple[float, float]:
    difference = (t.double() - reference)[judged]
    return (difference.abs().max().item(), difference.square().mean().sqrt().item()) if len(difference) else (0.0, 0.0)


def assert_as_good_as_eager(
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    *,
    what: str = "result",
    dtype: torch.dtype | None = None,
    scale: float = 0.0,
) -> None:
    """Apply the rule. `dtype` sets the eps where it is coarser than the result's (autocast).

    `scale` is the least magnitude to measure the floor by, for results that cancel to (nearly) nothing: the
    gradient before a LayerNorm over one channel is 0 and all there is to see is the rounding of its terms.

    Where the reference is not finite, `actual` must be what `eager` is: NaN for NaN, the same infinity.
    """
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager's is {eager.dtype}"
    reference = reference.double()
    if reference.numel() == 0:
        return
    representable = reference.to(eager.dtype).isfinite()
    lost = ~representable
    torch.testing.assert_close(
        actual[lost], eager[lost], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}, where not finite: {m}"
    )
    assert actual[representable].isfinite().all(), f"{what}: not finite where the fp64 reference is"
    if not representable.any():
        return
    judged = reference[representable]
    scales = (max(scale, judged.abs().max().item()), max(scale, judged.square().mean().sqrt().item()))
    # Where eager itself overflows it sets no standard, and only the floor remains.
    ours = _errors(actual, reference, representable)
    eagers = _errors(eager, reference, representable & eager.isfinite())
    eps = torch.finfo(dtype or eager.dtype).eps
    floor = FLOOR[dtype or eager.dtype] * eps
    for measure, error, eager_error, magnitude in zip(("largest", "rms"), ours, eagers, scales, strict=True):
        allowed = 2 * eager_error + floor * magnitude
        assert error <= allowed, (
            f"{what}: {measure} error {error:.3g} against fp64, eager's is {eager_error:.3g}; allowed {allowed:.3g} "
            f"(2 x eager's + {floor:.2g} x the scale {magnitude:.3g})"
        )


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
