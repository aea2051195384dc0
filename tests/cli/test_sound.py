import importlib.util
import sys

import numpy
import pytest
import torch
from scipy.io import wavfile

from convnext_kernels.cli import sound

INSTALLED = all(importlib.util.find_spec(name) for name in ("vocos", "torchaudio"))
needs_vocos = pytest.mark.skipif(not INSTALLED, reason="needs the extra vocos; .ci/extended examples installs it")


def tone(seconds, rate, dtype=numpy.float32, channels=1):
    """A tone of 440 Hz at half of the full scale."""
    wave = 0.5 * numpy.sin(2 * numpy.pi * 440 * numpy.arange(int(seconds * rate)) / rate)
    if dtype == numpy.uint8:
        wave = wave * 128 + 128
    elif dtype != numpy.float32:
        wave = wave * -float(numpy.iinfo(dtype).min)
    return numpy.stack([wave.astype(dtype)] * channels, axis=1).squeeze()


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.int16, numpy.int32, numpy.float32])
def test_every_format_gives_the_same_sound(tmp_path, dtype):
    """Ten seconds of two at 44.1 kHz in stereo, repeated: a tone is one at any rate."""
    wavfile.write(tmp_path / "a.wav", 44_100, tone(2, 44_100, dtype, channels=2))
    found = sound.read(tmp_path / "a.wav")
    expected = torch.from_numpy(tone(2, sound.RATE)).repeat(5)
    assert found.shape == (1, sound.RATE * sound.SECONDS)
    inside = slice(100, 2 * sound.RATE - 100)  # a filter's ends are others
    torch.testing.assert_close(found[0, inside], expected[inside], rtol=0, atol=0.01 if dtype == numpy.uint8 else 2e-3)


def test_wrong_sounds(fails, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    wavfile.write(tmp_path / "empty.wav", 8000, numpy.zeros(0, numpy.int16))
    wavfile.write(tmp_path / "nan.wav", 8000, numpy.full(10, numpy.nan, numpy.float32))
    wrong = ("demo", "--model", "vocos")
    fails(*wrong, tmp_path / "none.wav", words=("none.wav", "no such file"))
    fails(*wrong, tmp_path, words=("not a regular file",))
    fails(*wrong, tmp_path / "text.wav", words=("text.wav", "not a WAV file"))
    fails(*wrong, tmp_path / "empty.wav", words=("empty.wav", "finite samples", "none"))
    fails(*wrong, tmp_path / "nan.wav", words=("nan.wav", "finite samples"))
    fails(*wrong, tmp_path / "a.wav", tmp_path / "b.wav", words=("one WAV file", "2"), code=2)


def test_without_the_package(fails, tmp_path, monkeypatch):
    wavfile.write(tmp_path / "a.wav", sound.RATE, tone(1, sound.RATE))
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    fails("demo", "--model", "vocos", tmp_path / "a.wav", words=("not installed", "[vocos]"))


@needs_vocos
def test_report_shows_both_spectrograms(run, tmp_path):
    wavfile.write(tmp_path / "a.wav", sound.RATE, tone(1, sound.RATE))
    report = tmp_path / "r.html"
    options = ("--repeats", "1", "--dtype", "fp32", "--report", report)
    result = run("demo", "--model", "vocos", *options, tmp_path / "a.wav")
    assert result.exit_code == 0, result.output
    assert "8 modules replaced" in result.stdout
    text = report.read_text(encoding="utf-8")
    for caption in ("given", "eager, fp32", "accelerated, fp32", "difference of the two, fp32"):
        assert f"<figcaption>{caption}</figcaption>" in text
