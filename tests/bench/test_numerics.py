import math

import pytest
import torch

from convnext_kernels.bench.numerics import GARBAGE, compare, compare_top5, judge, judge_eager, relative_errors

REFERENCE = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)


def test_errors_are_the_largest_ones():
    eager = REFERENCE.float().clone()
    eager[0, 0] += 0.25
    accelerated = REFERENCE.float().clone()
    accelerated[1, 2] -= 0.5
    found = compare(REFERENCE, eager, accelerated)
    assert (found.difference, found.relative) == (0.5, 0.1)
    assert (found.eager_error, found.accelerated_error) == (0.25, 0.5)
    assert found.allowed == pytest.approx(2 * 0.25 + 5 * torch.finfo(torch.float32).eps, rel=1e-12)
    assert found.within


def test_more_than_twice_eagers_error_and_the_floor_fails():
    eager = REFERENCE.float() + 0.25
    assert not compare(REFERENCE, eager, REFERENCE.float() + 0.5001).within


def test_the_floor_serves_where_eager_is_exact():
    eager = REFERENCE.to(torch.bfloat16)
    assert compare(REFERENCE, eager, eager + 0).within
    step = eager.clone()
    step[1, 5] += 2**-5  # one unit in the last place of 5.0 in bf16
    assert compare(REFERENCE, eager, step).within
    step[1, 5] += 2**-4
    assert not compare(REFERENCE, eager, step).within


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["eager", "accelerated"])
def test_non_finite_results_are_never_within(bad, place):
    results = {"eager": REFERENCE.float().clone(), "accelerated": REFERENCE.float().clone()}
    results[place][0, 0] = bad
    found = compare(REFERENCE, results["eager"], results["accelerated"])
    assert math.isnan(found.difference) or found.difference == math.inf
    if place == "accelerated" or math.isnan(bad):
        assert not found.within


def test_top5_same_tie_and_different():
    same = REFERENCE.float()
    swapped = same.clone()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]  # classes half a logit apart
    assert [t.verdict for t in compare_top5(REFERENCE, same, swapped)] == ["different", "same"]
    rough = same.clone()
    rough[0, 0] += 0.125  # eager's own error on this image lets 4 * 0.125 be exchanged
    found = compare_top5(REFERENCE, rough, swapped)
    assert [t.verdict for t in found] == ["tie", "same"]
    assert [index for index, _ in found[0].eager] == [0, 1, 2, 3, 4]
    assert [index for index, _ in found[0].accelerated] == [0, 1, 2, 4, 3]
    # The same error on the other image lends nothing to this one.
    rough = same.clone()
    rough[1, 0] += 0.125
    assert [t.verdict for t in compare_top5(REFERENCE, rough, swapped)] == ["different", "same"]


def test_top5_of_nan_differs():
    broken = REFERENCE.float().clone()
    broken[0, 5] = math.nan
    assert compare_top5(REFERENCE, REFERENCE.float(), broken)[0].verdict == "different"


def test_fewer_than_five_classes():
    found = compare_top5(REFERENCE[:, :3], REFERENCE[:, :3].float(), REFERENCE[:, :3].float())
    assert [len(top5.eager) for top5 in found] == [3, 3]


EPS = torch.finfo(torch.float32).eps


def test_relative_errors_are_taken_tensor_by_tensor():
    truth = {"output": torch.tensor([4.0, -8.0]).double(), "gradient": torch.tensor([1e-3]).double()}
    found = relative_errors(truth, {"output": torch.tensor([4.0, -7.0]), "gradient": torch.tensor([2e-3])})
    assert found == {"output": 0.125, "gradient": pytest.approx(1.0)}
    assert math.isnan(relative_errors(truth, {**truth, "output": torch.tensor([4.0, math.nan])})["output"])


def test_a_tensor_may_be_twice_as_far_off_as_eagers():
    eager = {"output": 1e-5, "a": 2e-5, "b": 1e-7}
    assert judge(eager, eager, torch.float32).within
    allowed = 2 * 2e-5 + 8 * EPS
    assert judge(eager, {**eager, "a": allowed}, torch.float32).within
    worse = judge(eager, {**eager, "a": allowed * 1.01}, torch.float32)
    assert (worse.within, worse.tensor, worse.allowed) == (False, "a", pytest.approx(allowed))
    assert judge(eager, {**eager, "a": allowed * 9.9}, torch.float32, slack=10).within
    assert not judge(eager, {**eager, "a": allowed * 10.1}, torch.float32, slack=10).within


def test_where_eager_was_lucky_its_median_counts():
    eager = {"output": 1e-5, "a": 2e-5, "b": 0.0}
    assert judge(eager, {**eager, "b": 2e-5}, torch.float32).within
    assert not judge(eager, {**eager, "b": 3e-5}, torch.float32).within


def test_nan_is_never_within():
    eager = {"output": 1e-5, "a": 2e-5}
    found = judge(eager, {"output": 1e-5, "a": math.nan}, torch.float32)
    assert (found.within, found.tensor) == (False, "a")
    assert not judge_eager({"output": math.nan}, torch.float32).within


@pytest.mark.parametrize("dtype", list(GARBAGE))
def test_garbage_sets_no_standard(dtype):
    assert judge_eager({"a": 0.0, "b": GARBAGE[dtype]}, dtype).within
    found = judge_eager({"a": 0.0, "b": 2 * GARBAGE[dtype]}, dtype)
    assert (found.within, found.tensor) == (False, "b")
