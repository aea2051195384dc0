import time

import pytest
import torch

from convnext_kernels.cli.memory import peak_growth
from convnext_kernels.cli.timing import WARMUP, Timing, glibc, interleave


def test_calls_alternate_and_warm_up_is_not_counted():
    calls, rounds = [], []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = interleave(candidates, repeats=4, on_round=lambda: rounds.append(len(calls)))
    assert calls == ["a", "b"] * (WARMUP + 4)
    assert rounds == [2 * (n + 1) for n in range(WARMUP + 4)]
    assert {name: len(timing.milliseconds) for name, timing in times.items()} == {"a": 4, "b": 4}


def test_times_are_milliseconds_of_the_call():
    times = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=3)
    assert times["slow"].minimum >= 20
    assert times["fast"].median < 10


def test_calls_run_in_inference_mode():
    seen = []
    interleave({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, repeats=1)
    assert all(seen)


def test_median_and_minimum():
    timing = Timing((3.0, 1.0, 8.0, 4.0))
    assert (timing.median, timing.minimum) == (3.5, 1.0)


FAULTS = """
import resource, torch
from convnext_kernels.cli.timing import WARMUP, steady_allocator

def faults():
    for _ in range(WARMUP):
        torch.ones(2**24)  # 64 MiB: more than glibc keeps by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with steady_allocator() as works:
    print(faults())
print(faults())
assert works
"""


@pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")
def test_steady_allocator_spares_page_faults_and_ends(run_python):
    before, steady, after = map(int, run_python(FAULTS).split())
    assert steady < before / 20
    assert after > before / 2


def test_peak_growth_sees_temporaries_that_are_freed():
    size = 64 * 2**20

    def build():
        def model(x):
            for _ in range(3):
                temporary = torch.ones(size // 4) + x
                time.sleep(0.01)
                del temporary
            return x

        return model

    first, second = peak_growth(build, torch.ones(()), "cpu")
    assert 0.9 * size < first < 2.5 * size
    assert 0.9 * size < second < 2.5 * size
