import pytest

from convnext_kernels.tuning import autotune

pytest.importorskip("triton", minversion="3.4", reason="the timer is Triton's")


def test_nothing_is_timed_unless_asked_for_and_possible(monkeypatch):
    from convnext_kernels.backends.triton import device, timing

    assert timing.timer(print) is None  # not asked for: not even the device is looked at
    with autotune.autotune():
        monkeypatch.setattr(device, "interpreted", lambda: True)
        assert timing.timer(print) is None
        monkeypatch.setattr(device, "interpreted", lambda: False)
        monkeypatch.setattr(device, "type_", lambda: "meta")
        assert timing.timer(print) is None
        monkeypatch.setattr(device, "type_", lambda: "cuda")
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        assert timing.timer(print) is None
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        monkeypatch.setattr("triton.testing.do_bench", lambda call, return_mode: call() or 2.0)
        seen = []
        assert timing.timer(seen.append)("a candidate") == pytest.approx(2e-3)
        assert seen == ["a candidate"]


def test_a_timed_choice_replaces_what_the_plan_remembers(monkeypatch, tmp_path):
    import functools

    from convnext_kernels import tuning
    from convnext_kernels.backends.triton import timing
    from convnext_kernels.tuning import Candidate, Work, cache

    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(timing, "_settled", set())
    cache.forget()
    # In the order of their predicted times; the last is not even tried.
    candidates = [Candidate(str(i), {}, (Work(dram_bytes=1e9 * (i + 1)),)) for i in range(timing.MOST + 1)]
    gpu, problem, timed = tuning.named("H100"), (8, 96), []

    @functools.lru_cache
    def plan(problem, gpu):
        return tuning.pick("kernel", problem, candidates, gpu)

    def choose():
        return timing.choose("kernel", plan, problem, gpu, iter(candidates), lambda candidate: None).name

    def timer(run):
        return lambda candidate: (timed.append(candidate.name), 10.0 - int(candidate.name))[1]

    assert choose() == "0"
    monkeypatch.setattr(timing, "timer", lambda run: None)
    with autotune.autotune():
        assert choose() == "0"  # nothing can be timed, while a graph is captured say; the next call tries again
    monkeypatch.setattr(timing, "timer", timer)
    with autotune.autotune():
        assert choose() == str(timing.MOST - 1)
        assert choose() == str(timing.MOST - 1)
    assert timed == [str(i) for i in range(timing.MOST)]
    assert choose() == str(timing.MOST - 1)
    cache.forget()
