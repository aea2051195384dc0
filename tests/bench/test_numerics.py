import math

import pytest
import torch

from convnext_kernels.bench.numerics import GARBAGE, judge

REFERENCE = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)


EPS = torch.finfo(torch.float32).eps
EXACT = REFERENCE.float()


def verdict(eager, actual, reference=REFERENCE, dtype=torch.float32, **options):
    """The rule for one tensor."""
    return judge({"y": reference}, {"y": eager}, {"y": actual}, dtype, **options)


def off_at(*places, by):
    """Exact results but for an error at each of `places`."""
    y = EXACT.clone()
    for place in places:
        y[place] += by
    return y


def test_more_than_twice_eagers_error_and_the_floor_fails():
    assert verdict(EXACT + 0.25, EXACT + 0.5).within
    found = verdict(EXACT + 0.25, off_at((0, 0), by=0.5001))
    assert found.reason.startswith("y: largest error 0.5 against fp64, allowed 0.5")
    assert (found.error, found.allowed) == (pytest.approx(0.5001 / 5), pytest.approx((0.5 + 5 * 8 * EPS) / 5))


def test_what_is_wrong_a_little_everywhere_fails():
    eager = off_at((0, 0), by=0.25)
    assert verdict(eager, off_at((0, 1), (0, 2), (0, 3), by=0.25)).within
    found = verdict(eager, off_at((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), by=0.25))
    assert found.reason.startswith("y: rms error")


def test_the_floor_serves_where_eager_is_exact():
    eager = REFERENCE.to(torch.bfloat16)
    assert verdict(eager, eager, dtype=torch.bfloat16).within
    step = eager.clone()
    step[1, 5] += 2**-5  # one unit in the last place of 5.0 in bf16
    assert verdict(eager, step, dtype=torch.bfloat16).within
    step[1, 5] += 2**-4
    assert not verdict(eager, step, dtype=torch.bfloat16).within
    assert verdict(eager, step, dtype=torch.bfloat16, scale=20).within


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_results_are_never_within(bad):
    found = verdict(EXACT, off_at((0, 3), by=bad))
    assert found.reason == f"y: {bad} at [0, 3], fp64 1, eager 1; 1 such places"
    assert math.isnan(found.error)
    # Where eager overflows it sets no standard, and only the floor remains.
    assert verdict(off_at((0, 3), by=bad), EXACT).within
    assert not verdict(off_at((0, 3), by=bad), off_at((0, 3), by=0.01)).within


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf, 1e39])
def test_where_fp64_is_not_finite_eager_is_followed(lost):
    reference = REFERENCE.clone()
    reference[0, 0] = lost
    assert verdict(reference.float(), reference.float(), reference).within
    assert not verdict(reference.float(), EXACT, reference).within
    assert not verdict(reference.float(), off_at((1, 1), by=1) + reference.float() - EXACT, reference).within


def test_another_shape_or_dtype_is_told():
    assert verdict(EXACT, EXACT[:1]).reason.startswith("y: shape torch.Size([1, 6]), expected")
    assert verdict(EXACT, REFERENCE).reason == "y: dtype torch.float64, expected torch.float32"


def test_a_tensor_of_zeros():
    zero = torch.zeros(3)
    assert verdict(zero, zero, zero.double()).within
    assert verdict(zero + 1e-9, zero + 2e-9, zero.double()).within
    assert not verdict(zero, zero + 1e-9, zero.double()).within


def errors(**tensors):
    """Results of one element each that are so far from the reference, 1."""
    return {name: torch.tensor([1 + error], dtype=torch.float64) for name, error in tensors.items()}


ONES = errors(output=0, a=0, b=0)


def test_a_tensor_may_be_twice_as_far_off_as_eagers():
    eager = errors(output=1e-5, a=2e-5, b=1e-7)

    def found(a, slack=1):
        return judge(ONES, eager, eager | errors(a=a), torch.float32, slack=slack)

    allowed = 2 * 2e-5 + 8 * EPS
    assert found(0.999 * allowed).within
    worse = found(1.01 * allowed)
    assert worse.reason.startswith("a: ")
    assert worse.allowed == pytest.approx(allowed)
    assert found(9.9 * allowed, slack=10).within
    assert not found(10.1 * allowed, slack=10).within


def test_where_eager_was_lucky_its_median_counts():
    eager = errors(output=1e-5, a=2e-5, b=0)
    assert judge(ONES, eager, eager | errors(b=2e-5), torch.float32).within
    assert not judge(ONES, eager, eager | errors(b=3e-5), torch.float32).within


@pytest.mark.parametrize("dtype", list(GARBAGE))
def test_garbage_sets_no_standard(dtype):
    assert judge(ONES, None, errors(output=0, a=0.99 * GARBAGE[dtype], b=0), dtype).within
    found = judge(ONES, None, errors(output=0, a=0, b=2 * GARBAGE[dtype]), dtype)
    assert found.reason.startswith("b: ")
    assert judge(ONES, None, errors(output=0, a=0, b=2 * GARBAGE[dtype]), dtype, garbage=1).within
    assert not judge(ONES, None, errors(output=0, a=math.nan, b=0), dtype).within
