import json
import threading

import pytest

from convnext_kernels.tuning import GPUS, Candidate, Work, autotune, cache, forced, pick, remembered, shipped

GPU = GPUS["H100"]
SLOW = Candidate("slow", {}, (Work(dram_bytes=2e9, programs=10_000),))
FAST = Candidate("fast", {}, (Work(dram_bytes=1e9, programs=10_000),))
OTHER = Candidate("other", {}, (Work(dram_bytes=3e9, programs=10_000),))
CANDIDATES = (SLOW, FAST, OTHER)
PROBLEM = (8, 96)


@pytest.fixture
def measured_h100(tmp_path, monkeypatch):
    content = {"choices": {shipped.key("k", PROBLEM): "slow"}}
    (tmp_path / "measured_H100.json").write_text(json.dumps(content))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.choices.cache_clear()
    yield
    shipped.choices.cache_clear()


def measured(candidate):
    return {"slow": 2.0, "fast": 3.0, "other": 1.0}[candidate.name]


def test_the_cost_model_chooses_where_nothing_else_does():
    assert pick("k", PROBLEM, CANDIDATES, GPU) is FAST


def test_the_first_of_equals():
    twin = Candidate("twin", {}, FAST.launches)
    assert pick("k", PROBLEM, (FAST, twin), GPU) is FAST
    assert pick("k", PROBLEM, (twin, FAST), GPU) is twin


def test_shipped_measurements_come_before_the_cost_model(measured_h100):
    assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
    assert pick("k", (6, 96), CANDIDATES, GPU) is SLOW  # of the same class
    assert pick("k", PROBLEM, CANDIDATES, GPUS["A100"]) is FAST
    assert pick("another", PROBLEM, CANDIDATES, GPU) is FAST


def test_the_cache_comes_before_shipped_measurements(measured_h100):
    cache.remember("k", PROBLEM, GPU, "other")
    assert pick("k", PROBLEM, CANDIDATES, GPU) is OTHER


def test_names_that_no_longer_exist_are_passed_over(measured_h100):
    cache.remember("k", PROBLEM, GPU, "gone")
    assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
    assert pick("k", PROBLEM, (FAST, OTHER), GPU) is FAST


def test_a_forced_choice_comes_first():
    cache.remember("k", PROBLEM, GPU, "other")
    with forced(lambda kernel, problem, candidates, gpu: candidates[0] if kernel == "k" else None):
        assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
        assert pick("another", PROBLEM, CANDIDATES, GPU) is FAST
    assert pick("k", PROBLEM, CANDIDATES, GPU) is OTHER


def test_what_is_remembered_gives_way_to_a_forced_choice():
    plan = remembered(lambda problem: pick("k", problem, CANDIDATES, GPU))
    assert plan(PROBLEM) is FAST
    with forced(lambda *_: SLOW):
        assert plan(PROBLEM) is SLOW
    assert plan(PROBLEM) is FAST


def test_nothing_is_timed_unless_asked_for(file):
    def timer(candidate):
        raise AssertionError("timed")

    assert pick("k", PROBLEM, CANDIDATES, GPU, timer) is FAST
    with autotune.autotune():
        assert pick("k", PROBLEM, (FAST,), GPU, timer) is FAST  # nothing to choose
        assert pick("k", PROBLEM, CANDIDATES, GPU, None) is FAST  # while a CUDA graph is captured, say
    assert not file.exists()


@pytest.mark.parametrize("how", ["context", "environment"])
def test_autotune_times_once_and_keeps(measured_h100, file, monkeypatch, how):
    timed = []

    def timer(candidate):
        timed.append(candidate.name)
        return measured(candidate)

    if how == "environment":
        monkeypatch.setenv(autotune.ENVIRONMENT_VARIABLE, "1")
        assert pick("k", PROBLEM, CANDIDATES, GPU, timer) is OTHER
    else:
        with autotune.autotune():
            assert pick("k", PROBLEM, CANDIDATES, GPU, timer) is OTHER
    assert timed == ["slow", "fast", "other"]
    cache.forget()  # as the next process
    assert pick("k", (7, 96), CANDIDATES, GPU, timer) is OTHER
    assert len(timed) == 3
    assert file.exists()


def test_autotune_context_overrides_the_environment(monkeypatch):
    monkeypatch.setenv(autotune.ENVIRONMENT_VARIABLE, "1")
    with autotune.autotune(False):
        assert not autotune.wanted()
    assert autotune.wanted()
    monkeypatch.setenv(autotune.ENVIRONMENT_VARIABLE, "0")
    assert not autotune.wanted()


def test_autotune_reaches_the_threads_of_autograd():
    seen = []
    with autotune.autotune():
        thread = threading.Thread(target=lambda: seen.append(autotune.wanted()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_autotune_passes_over_what_does_not_run(caplog):
    def timer(candidate):
        if candidate is OTHER:
            raise RuntimeError("out of shared memory")
        return measured(candidate)

    with autotune.autotune():
        assert pick("k", PROBLEM, CANDIDATES, GPU, timer) is SLOW
    assert "k other does not run: out of shared memory" in caplog.text


def test_autotune_without_one_that_runs_falls_back(file):
    def timer(candidate):
        raise RuntimeError("no")

    with autotune.autotune():
        assert pick("k", PROBLEM, CANDIDATES, GPU, timer) is FAST
    assert not file.exists()


def test_no_candidates_is_an_error():
    with pytest.raises(ValueError, match=r"k: no candidates for \(8, 96\)"):
        pick("k", PROBLEM, (), GPU)


def test_a_handicap_must_be_made_up_for():
    better = Candidate("better", {}, (Work(dram_bytes=0.9e9, programs=10_000),), handicap=1.2)
    assert pick("k", PROBLEM, (FAST, better), GPU) is FAST
    with autotune.autotune():
        assert pick("k", PROBLEM, (FAST, better), GPU, lambda c: 1.0 if c is better else 1.1) is better
