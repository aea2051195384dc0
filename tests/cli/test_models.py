"""``convnext-kernels models`` and ``roadmap``."""

import json
import re

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("timm")


def test_coverage(run, fails):
    names = ("convnext_atto", "convnext_zepto_rms_ols", "ConvNextV2Model", "convnext_tiny")
    rows = {(r["library"], r["model"]): r for r in json.loads(run("models", "--coverage", "--json", *names).stdout)}
    assert all((r["blocks"], r["layers"]) == (r["served"], r["layers_served"]) for r in rows.values())
    atto, zepto = rows["timm", "convnext_atto"], rows["timm", "convnext_zepto_rms_ols"]
    assert (len(rows), atto["blocks"], zepto["blocks"], zepto["layers"]) == (5, 12, 10, 5)
    assert (atto["overlapping"], zepto["overlapping"]) == ([], ["3x3 stride 2"])
    assert not any(r["reasons"] for r in rows.values())
    fails("models", "--coverage", "convnext_ato", words=("unknown model 'convnext_ato'; close: convnext_atto",))


def test_roadmap_measured(run):
    names = ["resnet", "layer_norm", "convnext", "torchvision/mobilenet_v2"]
    options = ("--regime", "resnet50", "--measure", "--size", "32", "--rounds", "1")
    shown = run("roadmap", *options, *(word for name in names for word in ("--step", name))).stdout
    assert "images/s: medians of 1 rounds, batch 1, 32 x 32, fp32" in " ".join(shown.split())
    assert len(re.findall(r"\dx (?:faster|slower)|as fast", shown)) == 2  # the others have no kernel of ours
