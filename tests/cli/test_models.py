"""``convnext-kernels models`` and ``roadmap``."""

import re

import pytest

from convnext_kernels.cli import models
from convnext_kernels.interop.report import AccelerationReport, ReportRow

pytest.importorskip("torchvision")
pytest.importorskip("timm")


def test_coverage(fails, monkeypatch):
    names = ("convnext_atto", "convnext_zepto_rms_ols", "ConvNextV2Model", "convnext_tiny")
    table, said = models.coverage(names)
    rows = {row[:2]: row[2:] for row in table.rows}
    assert len(rows) == 5
    assert rows["timm", "convnext_atto"] == ("12", "12", "5", "5", "")
    assert rows["timm", "convnext_zepto_rms_ols"] == ("10", "10", "5", "5", "")
    assert "5 of 5 models whole" in said
    rows = (ReportRow("0", "A", "block", False, "why"), ReportRow("1", "A", "block", False, "", replaceable=True))
    monkeypatch.setattr(models, "acceleration_report", lambda model: AccelerationReport(rows))
    table, said = models.coverage(("convnext_atto",))
    assert table.rows[0][2:] == ("2", "1", "0", "0", "block: why")
    assert "1 of 2 blocks are served, 0 of 1 models whole" in said
    fails("models", "--coverage", "convnext_ato", words=("unknown model 'convnext_ato'; close: convnext_atto",))


def test_roadmap(run):
    shown = run("roadmap", "--regime", "resnet50").stdout
    assert re.search(r"separate downsampling \(ConvNeXt\) +81.97 +4.49 +4.456 +-0.77% +28.6 +22", shown)
