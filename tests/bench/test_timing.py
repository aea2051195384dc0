import os
import sys
from collections.abc import Callable

import pytest
import torch

from convnext_kernels.bench import timing
from convnext_kernels.bench.measure import peak_growth
from convnext_kernels.bench.timing import BURST_CALLS, WARMUP, interleave, pinned


@pytest.fixture
def no_faults(monkeypatch):
    monkeypatch.setattr(timing, "_page_faults", lambda: 0)


@pytest.mark.usefixtures("no_faults")
def test_calls_alternate_and_warm_up_is_not_counted():
    calls = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = interleave(candidates, rounds=4)
    assert calls == ["a", "b"] * (WARMUP + 4)
    assert {name: len(found.rounds) for name, found in times.items()} == {"a": 4, "b": 4}


def test_warm_up_goes_on_while_memory_is_faulted_in(monkeypatch):
    for busy_rounds, warm_up in ((5, 6), (100, timing.MOST_WARMUP)):
        faults = iter(min(n, 2 * busy_rounds) * 1000 for n in range(100))  # asked for before and after each round
        monkeypatch.setattr(timing, "_page_faults", lambda faults=faults: next(faults))
        calls = []
        interleave({"a": lambda calls=calls: calls.append(1)}, rounds=1)
        assert len(calls) == warm_up + 1


class Clock:
    """A clock that only calls move: each takes its seconds, whatever the load of the machine."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, call: Callable[[], object] = int) -> Callable[[], None]:
        def timed() -> None:
            call()
            self.now += seconds

        return timed


@pytest.mark.usefixtures("no_faults")
def test_bursts_alternate_and_drop_their_first_call():
    calls, clock = [], Clock()
    candidates = {
        "fast": clock.taking(timing.BURST_SECONDS / BURST_CALLS / 2, lambda: calls.append("fast")),
        "slow": clock.taking(timing.BURST_SECONDS, lambda: calls.append("slow")),
    }
    times = interleave(candidates, rounds=2, bursts=True, clock=clock)
    assert calls == ["fast", "slow"] * WARMUP + (["fast"] * (BURST_CALLS + 1) + ["slow"]) * 2
    assert [len(r) for r in times["fast"].rounds] == [BURST_CALLS] * 2
    assert [len(r) for r in times["slow"].rounds] == [1] * 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_pinned_keeps_this_thread_on_one_cpu_and_gives_it_back(monkeypatch):
    for name in timing.PINNING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    with pinned() as (cpus, reason):
        if not cpus:
            pytest.skip(reason)
        assert os.sched_getaffinity(0) == set(cpus)
        assert len(cpus) == 1
    assert os.sched_getaffinity(0) == before
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")  # whoever set it has pinned them
    with pinned() as found:
        assert found == ([], "left to GOMP_CPU_AFFINITY=0")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_peak_growth_sees_temporaries_that_are_freed():
    size = 64 * 2**20
    assert peak_growth(lambda: None, "cpu") < 0.3 * size
    assert 0.9 * size < peak_growth(lambda: torch.ones(size // 4).sum(), "cpu") < 1.5 * size
