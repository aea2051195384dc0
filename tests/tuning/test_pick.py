import pytest

from convnext_kernels.tuning import GPUS, Candidate, Work, cache, forced, pick, remembered, shipped

GPU = GPUS["H100"]
SLOW = Candidate("slow", {}, (Work(dram_bytes=2e9, programs=10_000),))
FAST = Candidate("fast", {}, (Work(dram_bytes=1e9, programs=10_000),))
OTHER = Candidate("other", {}, (Work(dram_bytes=3e9, programs=10_000),))
CANDIDATES = (SLOW, FAST, OTHER)
PROBLEM = (8, 96)


@pytest.fixture
def measured_h100(tmp_path, monkeypatch):
    """A file as `tune` writes it on such a GPU, by another version."""
    entry = cache.key("k", PROBLEM, GPU).replace(cache.__version__, "0.0.1")
    cache.write(tmp_path / "measured_H100.json", {entry: "slow"})
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.choices.cache_clear()
    yield
    shipped.choices.cache_clear()


def test_the_cost_model_chooses_where_nothing_else_does():
    assert pick("k", PROBLEM, CANDIDATES, GPU) is FAST
    twin = Candidate("twin", {}, FAST.launches)
    assert pick("k", PROBLEM, (twin, FAST), GPU) is twin, "the first of equals"


def test_measurements_come_first(measured_h100, remember):
    """Shipped ones before the cost model, those of this machine before them, and forced choices before all."""
    assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
    assert pick("k", (6, 96), CANDIDATES, GPU) is SLOW  # of the same class
    assert pick("k", PROBLEM, CANDIDATES, GPUS["A100"]) is FAST
    assert pick("another", PROBLEM, CANDIDATES, GPU) is FAST
    remember("k", PROBLEM, GPU, "other")
    assert pick("k", PROBLEM, CANDIDATES, GPU) is OTHER
    with forced(lambda kernel, problem, candidates, gpu: candidates[0] if kernel == "k" else None):
        assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
        assert pick("another", PROBLEM, CANDIDATES, GPU) is FAST


def test_what_is_remembered_gives_way_to_forced_and_to_timed_choices(remember):
    plan = remembered(lambda problem: pick("k", problem, CANDIDATES, GPU))
    assert plan(PROBLEM) is FAST
    with forced(lambda *_: SLOW):
        assert plan(PROBLEM) is SLOW
    assert plan(PROBLEM) is FAST
    remember("k", PROBLEM, GPU, "other")
    assert plan(PROBLEM) is OTHER


def test_a_handicap_must_be_made_up_for(remember):
    better = Candidate("better", {}, (Work(dram_bytes=0.9e9, programs=10_000),), handicap=1.2)
    assert pick("k", PROBLEM, (FAST, better), GPU) is FAST
    remember("k", PROBLEM, GPU, "better")
    assert pick("k", PROBLEM, (FAST, better), GPU) is better
