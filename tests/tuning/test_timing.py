import pytest

from convnext_kernels.tuning import autotune

pytest.importorskip("triton", reason="the timer is Triton's")


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
