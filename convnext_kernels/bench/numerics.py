"""The rule for "same result": errors against fp64, and the order of the best classes."""

import statistics
from collections.abc import Mapping
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


JUDGE_RULE = (
    "A speed is reported only where the numbers are right: errors are the largest differences to fp64 (same weights "
    "and inputs) over the largest fp64 value, of the output and, in training, of every gradient; each may be at most "
    "twice eager's (or twice the median of eager's, if that is more) plus 1 machine epsilon of the dtype (8 in fp32). "
    "Peers may be ten times as far off: none is to be left out for a last digit."
)
PEER_SLACK = 10  # torch.compile's fp32 gradients are up to 2.1 times as far off as ours may be
# Machine epsilons that are allowed beyond eager's error: the one of rounding a 16-bit result; in fp32, sums in another
# order and a polynomial for erf (5e-7). The tests hold the kernels to the same (tests/tolerance.py).
FLOOR = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
# Beyond these relative errors eager itself is wrong, and nothing can be judged by it: oneDNN has returned garbage for
# 16-bit convolutions (pytorch issue 169688).
GARBAGE = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.1}


@dataclass(frozen=True)
class Judgement:
    """The tensor that comes closest to breaking `judge`'s rule, or breaks it; relative errors against fp64."""

    tensor: str
    error: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether the rule holds; False for NaN."""
        return self.error <= self.allowed


def relative_errors(reference: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor to its fp64 `reference`, over that one's largest value."""
    return {
        name: ((result[name].double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300)).item()
        for name, truth in reference.items()
    }


def judge(
    eager: Mapping[str, float], candidate: Mapping[str, float], dtype: torch.dtype, slack: float = 1
) -> Judgement:
    """Judge by `relative_errors` of every tensor: outputs and, in training, all gradients.

    The error of a tensor may be at most twice eager's, or twice the median of eager's over all tensors where
    eager was lucky with this one, plus FLOOR machine epsilons; `slack` times that.
    """
    usual = statistics.median(eager.values())
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    judgements = [
        Judgement(name, candidate[name], slack * (2 * max(error, usual) + floor)) for name, error in eager.items()
    ]
    return max(judgements, key=lambda j: (not j.within, j.error / j.allowed))


def judge_eager(eager: Mapping[str, float], dtype: torch.dtype, garbage: float | None = None) -> Judgement:
    """Whether eager is fit to be the standard: every error below `garbage`, else below GARBAGE."""
    bound = GARBAGE[dtype] if garbage is None else garbage
    name = max(eager, key=lambda k: (not eager[k] <= bound, eager[k]))
    return Judgement(name, eager[name], bound)
