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


def test_roadmap_measured(run):
    names = ["resnet", "layer_norm", "convnext"]
    options = ("--regime", "resnet50", "--measure", "--size", "32", "--rounds", "1")
    shown = run("roadmap", *options, *(word for name in names for word in ("--step", name))).stdout
    assert "images/s: medians of 1 rounds, batch 1, 32 x 32, fp32" in " ".join(shown.split())
    assert len(re.findall(r"\dx (?:faster|slower)|as fast", shown)) == 2  # the others have no kernel of ours
