import pytest

from convnext_kernels.backends.cpu import native
from convnext_kernels.tuning import cache

pytest.importorskip("torchvision", reason="models are looked for there first")
pytest.importorskip("timm", reason="its models are tuned")
SMALL = ("--model", "timm/test_convnext", "--size", 32, "--batch", 1, "--device", "cpu", "--threads", 1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    cache.forget()
    yield
    cache.forget()


@pytest.mark.skipif(native.import_error() is not None, reason="compares the cpu backend with eager")
def test_a_file_is_written_and_read(run, tmp_path):
    file = tmp_path / "new" / "tuned.json"
    result = run("tune", *SMALL, "--minutes", 1, "--write", file)
    assert result.exit_code == 0, result.output
    assert "timm/test_convnext, batch 1" in result.output
    assert f"{len(cache.read(file))} choices were read" in run("tune", "--read", file).output
    shown = run("tune", *SMALL, "--minutes", 1e-9).output  # over before the first call is timed
    assert "timm/test_convnext, batch 1" in shown
    assert "not timed: layernorm 1x" in shown
    assert "not timed: downsample k2 1x" in shown


def test_what_is_wrong_gets_one_line(fails, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for arguments, words in (
        (("--model", "resnet18", "--size", 32), ("after accelerate()",)),
        (("--read", tmp_path / "bad.json"), ("bad.json", "not a file of timed choices")),
    ):
        fails("tune", *arguments, words=words)
    fails("tune", "--minutes", 0, words=("--minutes",), code=2)
    fails("tune", "--write", tmp_path, words=("--write", "Is a directory"), code=2)
    fails("tune", "--read", tmp_path / "none.json", words=("--read", "none.json", "does not exist"), code=2)
