"""The rule for "same result": errors against fp64, and the order of the best classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

RULE = (
    "The largest error of the accelerated result against fp64 (same weights and inputs) may be at most twice eager's "
    "own plus one machine epsilon of the dtype times the largest value."
)
TOP5_RULE = (
    "The best five classes count as the same when, at each place, both name one class, or are tied: two classes "
    "whose fp64 logits lie no further apart than twice that error, taken for this image."
)


def _allowed(eager_error: Tensor, floor: float) -> Tensor:
    return 2 * eager_error + floor


def _floor(reference: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * reference.abs().max().item()


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences over all elements; NaN where a result holds NaN."""

    difference: float  # accelerated against eager
    relative: float  # the same over the largest |fp64 value|
    eager_error: float  # against fp64
    accelerated_error: float  # against fp64
    allowed: float  # what RULE allows for accelerated_error

    @property
    def within(self) -> bool:
        """Whether RULE holds; False for NaN."""
        return self.accelerated_error <= self.allowed


def compare(reference: Tensor, eager: Tensor, accelerated: Tensor) -> Comparison:
    """Compare two results of one shape and dtype with an fp64 `reference`."""
    dtype = eager.dtype
    eager, accelerated = eager.double(), accelerated.double()
    difference = (accelerated - eager).abs().max().item()
    eager_error = (eager - reference).abs().max()
    return Comparison(
        difference,
        difference / reference.abs().max().item(),
        eager_error.item(),
        (accelerated - reference).abs().max().item(),
        _allowed(eager_error, _floor(reference, dtype)).item(),
    )


@dataclass(frozen=True)
class Top5:
    """The best classes of one image, best first, as (index, probability)."""

    eager: list[tuple[int, float]]
    accelerated: list[tuple[int, float]]
    verdict: str  # "same", "tie" (as TOP5_RULE says) or "different"


def _best(logits: Tensor) -> list[tuple[int, float]]:
    values, indices = logits.softmax(-1).topk(min(5, logits.shape[-1]))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def compare_top5(reference: Tensor, eager: Tensor, accelerated: Tensor) -> list[Top5]:
    """Apply TOP5_RULE to logits (images, classes)."""
    floor = _floor(reference, eager.dtype)
    found = []
    for truth, a, b in zip(reference, eager.double(), accelerated.double(), strict=True):
        best_a, best_b = _best(a), _best(b)
        exchanged = [(i, j) for (i, _), (j, _) in zip(best_a, best_b, strict=True) if i != j]
        if not exchanged:
            verdict = "same"
        else:
            bridge = 2 * _allowed((a - truth).abs().max(), floor)
            tied = all(bool((truth[i] - truth[j]).abs() <= bridge) for i, j in exchanged)
            verdict = "tie" if tied else "different"
        found.append(Top5(best_a, best_b, verdict))
    return found
