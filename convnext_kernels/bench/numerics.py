"""The one rule for "same result", of the tests and of what is timed: errors against fp64 beside those of eager PyTorch.

It is asked of the largest error and of the root mean square error: the second catches what is wrong a little everywhere
(an approximate GELU, sums in bf16), the first what is wrong in one place.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Machine epsilons that are allowed beyond eager's error. A 16-bit result is rounded once at the end, half an epsilon,
# and whatever a kernel does before is done in fp32. An fp32 kernel may sum in another order and use its own polynomial
# for erf (5e-7).
FLOOR = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
PEER_SLACK = 10  # torch.compile's fp32 gradients are up to 2.1 times as far off as ours may be
# Beyond these relative errors eager itself is wrong, and nothing can be judged by it: oneDNN has returned garbage for
# 16-bit convolutions (pytorch issue 169688).
GARBAGE = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.1}
RULE = (
    "Two errors against fp64 (same weights and inputs) are taken, the largest and the root mean square. Each may be at "
    f"most twice eager's own plus {FLOOR[torch.bfloat16]} machine epsilon of the dtype ({FLOOR[torch.float32]} in "
    "fp32) times the largest, or the root mean square, fp64 value."
)
BENCH_RULE = (
    f"A speed is reported only where the numbers are right. {RULE} That holds for the output and, in training, for "
    "every gradient; where eager was lucky with one of these, the median of its errors relative to the fp64 values "
    f"counts. Peers may be {PEER_SLACK} times as far off: none is to be left out for a last digit."
)
TOP5_RULE = (
    "The best five classes count as the same when, at each place, both name one class, or are tied: two classes "
    "whose fp64 logits lie no further apart than twice the largest error allowed on this image."
)
_TINY = 1e-200  # stands for the size of a tensor of zeros


@dataclass(frozen=True)
class Judgement:
    """The error that breaks the rule, or comes closest to it; both relative to the largest or rms fp64 value."""

    error: float  # NaN where something else is wrong
    allowed: float
    reason: str = ""  # what breaks the rule, in words; "" for nothing

    @property
    def within(self) -> bool:
        """Whether the rule holds."""
        return not self.reason


def _allowed(eager_error: float, size: float, dtype: torch.dtype) -> float:
    return 2 * eager_error + FLOOR[dtype] * torch.finfo(dtype).eps * size


def _magnitudes(t: Tensor, where: Tensor) -> tuple[float, float]:
    """Largest and root mean square magnitude of fp64 `t` at the places `where`."""
    t = torch.where(where, t, 0)
    return t.abs().max().item(), (t.square().sum() / where.sum().clamp_min(1)).sqrt().item()


def _different(truth: Tensor, eager: Tensor, result: Tensor) -> str:
    """What no error can be taken of: another shape or dtype, or values that are not finite where others are; or ""."""
    for what in ("shape", "dtype"):
        found, expected = getattr(result, what), getattr(truth if what == "shape" else eager, what)
        if found != expected:
            return f"{what} {found}, expected {expected}"
    same = (result == eager) | (result.isnan() & eager.isnan())
    wrong = ~torch.where(truth.to(eager.dtype).isfinite(), result.isfinite(), same)
    if not wrong.any():
        return ""
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{result[place]:g} at {list(place)}, fp64 {truth[place]:g}, eager {eager[place]:g}; {wrong.sum()} such places"
    )


def judge(
    reference: Mapping[str, Tensor],
    eager: Mapping[str, Tensor] | None,
    result: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    slack: float = 1,
    scale: float = 0,
    garbage: float | None = None,
) -> Judgement:
    """Judge the tensors of `result`, outputs and gradients, by the fp64 `reference` and same-dtype `eager`.

    The largest and the rms error of each may be at most twice eager's, or twice the median of eager's relative errors
    over all tensors where eager was lucky with this one, plus FLOOR machine epsilons of `dtype` times the magnitude of
    the reference; `slack` times that. `scale` is the least magnitude to take, for results that cancel to (nearly)
    nothing: the gradient before a LayerNorm over one channel is 0, and all there is to see is the rounding of its
    terms. Where eager itself overflows it sets no standard, and only the floor remains. Where the reference is not
    finite in eager's dtype the result must be what eager's is: NaN for NaN, the same infinity.

    Without `eager`, for eager itself and where that is no standard, every relative error must be below `garbage`,
    else below GARBAGE.
    """
    if eager is None:
        return _judge_alone(reference, result, GARBAGE[dtype] if garbage is None else garbage)
    rows = []  # what, error, eager's, magnitude
    for name, truth in reference.items():
        different = _different(truth, eager[name], result[name])
        if different:
            return Judgement(math.nan, _allowed(0, 1, dtype), f"{name}: {different}")
        if not truth.numel():
            continue
        finite = truth.to(eager[name].dtype).isfinite()
        errors = _magnitudes(result[name].double() - truth, finite)
        eagers = _magnitudes(eager[name].double() - truth, finite & eager[name].isfinite())
        sizes = (max(size, scale, _TINY) for size in _magnitudes(truth, finite))
        rows += zip((f"{name}: largest", f"{name}: rms"), errors, eagers, sizes, strict=True)
    usual = [statistics.median(e / size for _, _, e, size in rows[k::2]) for k in range(2) if rows]
    found = [(0.0, Judgement(0, _allowed(0, 1, dtype)))]
    for k, (what, error, e, size) in enumerate(rows):
        allowed = slack * _allowed(max(e, usual[k % 2] * size), size, dtype)
        reason = (
            f"{what} error {error:.3g} against fp64, allowed {allowed:.3g}; eager's is {e:.3g}, the size {size:.3g}"
        )
        judgement = Judgement(error / size, allowed / size, "" if error <= allowed else reason)
        found.append((error / allowed, judgement))
    return max(found, key=lambda pair: pair[0])[1]


def _judge_alone(reference: Mapping[str, Tensor], result: Mapping[str, Tensor], bound: float) -> Judgement:
    errors = {
        name: ((result[name].double() - truth).abs().max() / truth.abs().max().clamp_min(_TINY)).item()
        for name, truth in reference.items()
    }
    name = max(errors, key=lambda k: (not errors[k] <= bound, errors[k]))
    reason = f"{name}: largest error {errors[name]:.3g} of the largest fp64 value, allowed {bound:.3g}"
    return Judgement(errors[name], bound, "" if errors[name] <= bound else reason)


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences over all elements; NaN where a result holds NaN."""

    difference: float  # accelerated against eager
    relative: float  # the same over the largest |fp64 value|
    eager_error: float  # against fp64
    accelerated_error: float  # against fp64
    allowed: float  # what RULE allows for accelerated_error
    reason: str = ""  # how RULE is broken, which is also asked of the root mean square; "" if it holds


def compare(reference: Tensor, eager: Tensor, accelerated: Tensor) -> Comparison:
    """Compare the logits of two models, of one dtype, with those of an fp64 `reference`."""
    difference, eager_error, error = (
        (a.double() - b.double()).abs().max().item()
        for a, b in ((accelerated, eager), (eager, reference), (accelerated, reference))
    )
    size = reference.abs().max().item()
    judgement = judge({"logits": reference}, {"logits": eager}, {"logits": accelerated}, eager.dtype)
    allowed = _allowed(eager_error, size, eager.dtype)
    return Comparison(difference, difference / size, eager_error, error, allowed, judgement.reason)


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
    size = reference.abs().max().item()
    found = []
    for truth, a, b in zip(reference, eager.double(), accelerated.double(), strict=True):
        best_a, best_b = _best(a), _best(b)
        exchanged = [(i, j) for (i, _), (j, _) in zip(best_a, best_b, strict=True) if i != j]
        if not exchanged:
            verdict = "same"
        else:
            bridge = 2 * _allowed((a - truth).abs().max().item(), size, eager.dtype)
            tied = all(bool((truth[i] - truth[j]).abs() <= bridge) for i, j in exchanged)
            verdict = "tie" if tied else "different"
        found.append(Top5(best_a, best_b, verdict))
    return found
