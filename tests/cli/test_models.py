"""``convnext-kernels models`` and ``roadmap``."""

import re

import pytest

from convnext_kernels.cli import models
from convnext_kernels.cli import roadmap as cli_roadmap
from convnext_kernels.interop.report import AccelerationReport, ReportRow

pytest.importorskip("torchvision")
pytest.importorskip("timm")


def test_models(run):
    shown = run("models").stdout
    assert "19 of 19 rows are within 1% of the published figures" in shown
    assert "convnextv2_huge" in shown


def test_counted():
    table, _ = models.counted(("convnext_base",))
    assert [(row[:2], row[-1]) for row in table.rows] == [
        (("convnext_base", "224"), "yes"),
        (("convnext_base", "384"), "yes"),
    ]
    assert table.rows[0][6:8] == ("15.4", "15.355")


def test_coverage(fails, monkeypatch):
    names = ("convnext_atto", "convnext_zepto_rms_ols", "ConvNextV2Model", "convnext_tiny")
    table, said = models.coverage(names)
    rows = {row[:2]: row[2:] for row in table.rows}
    assert len(rows) == 5
    assert rows["timm", "convnext_atto"] == ("12", "12", "5", "5", "")
    assert rows["timm", "convnext_zepto_rms_ols"] == ("10", "10", "5", "5", "stem 3x3 stride 2: PyTorch's")
    assert "5 of 5 models whole" in said
    assert "matrix products" in said
    rows = (ReportRow("0", "A", "block", False, "why"), ReportRow("1", "A", "block", False, "", replaceable=True))
    monkeypatch.setattr(models, "acceleration_report", lambda model: AccelerationReport(rows))
    table, said = models.coverage(("convnext_atto",))
    assert table.rows[0][2:] == ("2", "1", "0", "0", "block: why")
    assert "1 of 2 blocks are served, 0 of 1 models whole" in said
    assert "matrix products" not in said
    fails("models", "--coverage", "convnext_ato", words=("unknown model 'convnext_ato'; close: convnext_atto",))


def test_unknown_model(fails):
    fails("models", "convnext_basse", words=("unknown model 'convnext_basse'; close: convnext_base",))


@pytest.mark.extended
def test_roadmap(run, tmp_path):
    shown = run("roadmap", "--report", str(tmp_path / "new")).stdout
    assert "BN to LN: published 4.46, but a LayerNorm counts what a BatchNorm does" in " ".join(shown.split())
    assert "differs from the published GFLOPs" not in shown
    page = (tmp_path / "new" / "roadmap.html").read_text()
    assert page.count("<svg") == 2
    assert "separate downsampling (ConvNeXt)" in page
    assert "torchvision/swin_b" in page
    assert {len(cli_roadmap.networks(regime).rows) for regime in ("resnet50", "resnet200")} == {17 + 4, 17 + 2}
    for regime in ("resnet50", "resnet200"):
        assert (tmp_path / "new" / f"roadmap-{regime}.png").read_bytes()[:4] == b"\x89PNG"


def test_roadmap_measured(run):
    names = ["resnet", "layer_norm", "convnext", "torchvision/mobilenet_v2"]
    options = ("--regime", "resnet50", "--measure", "--size", "32", "--rounds", "1")
    shown = run("roadmap", *options, *(word for name in names for word in ("--step", name))).stdout
    assert "images/s: medians of 1 rounds, batch 1, 32 x 32, fp32" in " ".join(shown.split())
    assert len(re.findall(r"\dx (?:faster|slower)|as fast", shown)) == 2  # the others have no kernel of ours


def test_unknown_step(fails):
    fails("roadmap", "--step", "kernel7", words=("--step: unknown step 'kernel7'; close: kernel_7",))
