"""The rule for a right result, in tests and benchmarks: its error against fp64 is compared with that of eager PyTorch.

The rule applies to the largest error and to the root mean square error. The first finds a mistake in one place, the
second finds small mistakes everywhere (an approximate GELU, sums in bf16).
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Machine epsilons that are allowed in addition to twice eager's error. A 16-bit result is rounded once at the end (half
# an epsilon), and a kernel computes everything before in fp32. An fp32 kernel may sum in another order and use its own
# polynomial for erf (5e-7).
FLOOR = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
PEER_SLACK = 10  # the error of torch.compile's fp32 gradients is up to 2.1 times the error that is allowed for ours
# With a larger relative error eager itself is wrong and no standard for others: oneDNN has returned garbage for 16-bit
# convolutions (pytorch issue 169688).
GARBAGE = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.1}
RULE = (
    "Every result is compared with the fp64 result of the same weights and inputs. Two errors are computed, the "
    "largest and the root mean square. Each may be at most twice the error of eager plus the floor, which is "
    f"{FLOOR[torch.bfloat16]} machine epsilon of the dtype ({FLOOR[torch.float32]} in fp32) times the largest, or the "
    "root mean square, fp64 value."
)
_TINY = 1e-200  # used as the size of a tensor of zeros


@dataclass(frozen=True)
class Judgement:
    """The error that breaks the rule or comes closest to that; both are relative to the largest or rms fp64 value."""

    error: float  # NaN if the result is wrong in another way
    allowed: float
    reason: str = ""  # how the rule is broken, in words; "" if it holds

    @property
    def within(self) -> bool:
        """Whether the rule holds."""
        return not self.reason


def allowed(eager_error: float, size: float, dtype: torch.dtype) -> float:
    """The error that is allowed beside an error of eager, for a tensor whose largest (rms) magnitude is `size`."""
    return 2 * eager_error + FLOOR[dtype] * torch.finfo(dtype).eps * size


def _magnitudes(t: Tensor, where: Tensor) -> tuple[float, float]:
    """Largest and root mean square magnitude of fp64 `t` where `where` is true."""
    t = torch.where(where, t, 0)
    return t.abs().max().item(), (t.square().sum() / where.sum().clamp_min(1)).sqrt().item()


def _different(truth: Tensor, eager: Tensor, result: Tensor) -> str:
    """Return why no error can be computed (shape, dtype, or values that are wrongly not finite), or ""."""
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

    Each tensor has a largest and an rms error. Each of these may be at most twice that of eager, plus FLOOR machine
    epsilons of `dtype` times the magnitude of the reference. If eager's error in this tensor is below the median of its
    relative errors over all tensors, the median counts instead. `slack` multiplies the allowed error.

    `scale` is the least magnitude, for results that cancel to (nearly) zero: the gradient before a LayerNorm over one
    channel is 0, and only the rounding of its terms remains. Where eager overflows, only the floor is allowed. Where
    the reference is not finite in eager's dtype, the result must equal eager's: NaN for NaN, the same infinity.

    Without `eager` (for eager itself, and if eager is wrong) every relative error must be at most `garbage`, or GARBAGE
    if that is None.
    """
    if eager is None:
        return _judge_alone(reference, result, GARBAGE[dtype] if garbage is None else garbage)
    rows = []  # what, error, eager's, magnitude
    for name, truth in reference.items():
        different = _different(truth, eager[name], result[name])
        if different:
            return Judgement(math.nan, allowed(0, 1, dtype), f"{name}: {different}")
        if not truth.numel():
            continue
        finite = truth.to(eager[name].dtype).isfinite()
        errors = _magnitudes(result[name].double() - truth, finite)
        eagers = _magnitudes(eager[name].double() - truth, finite & eager[name].isfinite())
        sizes = (max(size, scale, _TINY) for size in _magnitudes(truth, finite))
        rows += zip((f"{name}: largest", f"{name}: rms"), errors, eagers, sizes, strict=True)
    usual = [statistics.median(e / size for _, _, e, size in rows[k::2]) for k in range(2) if rows]
    found = [(0.0, Judgement(0, allowed(0, 1, dtype)))]
    for k, (what, error, e, size) in enumerate(rows):
        most = slack * allowed(max(e, usual[k % 2] * size), size, dtype)
        reason = f"{what} error {error:.3g} against fp64, allowed {most:.3g}; eager's is {e:.3g}, the size {size:.3g}"
        found.append((error / most, Judgement(error / size, most / size, "" if error <= most else reason)))
    return max(found, key=lambda pair: pair[0])[1]


def _judge_alone(reference: Mapping[str, Tensor], result: Mapping[str, Tensor], bound: float) -> Judgement:
    errors = {
        name: ((result[name].double() - truth).abs().max() / truth.abs().max().clamp_min(_TINY)).item()
        for name, truth in reference.items()
    }
    name = max(errors, key=lambda k: (not errors[k] <= bound, errors[k]))
    reason = f"{name}: largest error {errors[name]:.3g} of the largest fp64 value, allowed {bound:.3g}"
    return Judgement(errors[name], bound, "" if errors[name] <= bound else reason)
