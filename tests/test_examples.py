"""The examples run as their docstrings say."""

import contextlib
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from convnext_kernels.models import create_model

for library in ("matplotlib", "PIL", "sklearn"):
    pytest.importorskip(library)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "arguments", "words"),
    [
        (
            *("backbone", "torch", ["--model", "convnextv2_atto", "--output", "maps.png"]),
            ("stride  4: (1, 40, 120, 160)", "stride 32: (1, 320, 15, 20)"),
        ),
        ("features", "transformers", [], ("12 of 12 replaced", "vectors (3, 192), maps (3, 192, 7, 7)")),
        ("finetune", "timm", ["--steps", "2", "--batch", "8"], ("step 2: loss", "200 held-out images: 0.")),
        pytest.param(
            *("export", "torchvision", ["--output", "e"], ("operators.pt2: logits differ", "kernels.pt2: logits")),
            marks=pytest.mark.extended,  # tests/deployment exports in every run
        ),
        ("replknet", "torch", [], ("step 9: loss", "merged: 2 depthwise convolutions")),
        # .ci/extended examples installs it
        ("vocoder", "vocos", ["--output", "v.wav"], ("8 of 8 replaced", "ms after; samples differ by")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_example(name, needs, arguments, words, tmp_path, monkeypatch, capsys):
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) if name != "replknet" else contextlib.nullcontext() as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended is None or ended.value.code == 0
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed
    for difference in re.findall(r"differs? by (?:at most )?(\S+)", printed):
        assert float(difference) < 1e-4


def test_tour(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    names, threads = {"__name__": "__main__"}, torch.get_num_threads()
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    finally:
        torch.set_num_threads(threads)
    assert names["difference"] < 1e-4


def test_serve(monkeypatch):
    client = pytest.importorskip("starlette.testclient")
    import io

    from PIL import Image

    def file(size, kind="PNG"):
        data = io.BytesIO()
        Image.new("L", size, 200).save(data, kind)
        return data.getvalue()

    example = runpy.run_path(str(EXAMPLES / "serve.py"))
    torch.manual_seed(0)
    run = example["prepare"](create_model("convnextv2_atto", num_classes=7).eval())
    with client.TestClient(example["application"](run)) as service:
        answers = [service.post("/classify", content=file((300, 200), kind)) for kind in ("PNG", "JPEG", "GIF")]
        for answer in answers:
            assert answer.status_code == 200
            assert len(set(answer.json()["classes"])) == 5
            assert sorted(answer.json()["probabilities"], reverse=True) == answer.json()["probabilities"]
        for content, status, words in (
            (b"", 400, "image: cannot be read"),
            (file((300, 200))[:90], 400, "image: cannot be"),
            (file((9000, 9000)), 400, "image: expected at most 50000000 pixels, got 9000x9000"),
            (b"0" * (11 << 20), 413, "image: expected at most 10485760 bytes"),
        ):
            answer = service.post("/classify", content=content)
            assert (answer.status_code, words in answer.text) == (status, True), answer.text
        assert service.get("/classify").status_code == 405
        assert service.get("/healthz").json() == {"ok": True, "waiting": 0}
        monkeypatch.setitem(example["Batcher"].classify.__globals__, "MAX_WAITING", 0)
        assert service.post("/classify", content=file((30, 20))).status_code == 503
