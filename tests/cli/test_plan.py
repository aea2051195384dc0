import json
import re

import pytest

pytest.importorskip("torchvision", reason="its models are planned")
pytest.importorskip("timm", reason="its models are planned")


def test_table(run):
    result = run("plan")
    assert result.exit_code == 0, result.output
    assert "torchvision/convnext_tiny on H100, batch 8, 224 x 224, bf16, forward: predicted" in result.output
    assert "Predicted, not measured" in result.output
    assert re.search(r"\d\.\d\dx faster", result.output)
    for line in ("block 96 x 56 x 56 k7", "block 768 x 7 x 7 k7", "downsample", "layernorm", "other layers", "total"):
        assert line in result.output


def test_json(run):
    arguments = ("--model", "timm/convnextv2_atto", "--gpu", "rtx 4090", "--batch", 1, "--dtype", "fp32", "--training")
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["basis"], content["gpu"]["name"], content["training"]) == ("predicted", "RTX4090", True)
    blocks = [row for row in content["rows"] if row["name"].startswith("block V2")]
    assert [row["count"] for row in blocks] == [2, 2, 6, 2]
    for row in content["rows"]:
        assert row["ours"]["launches"] > 0
        assert row["ours"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "V100"), ("unknown GPU 'V100'", "A100", "RTX5090")),
        (("--model", "convnext_tiney"), ("--model convnext_tiney", "close: ", "convnext_tiny")),
        (("--model", "resnet18"), ("torchvision/resnet18", "no module that this package can replace")),
    ],
)
def test_what_is_wrong_gets_one_line(fails, arguments, words):
    fails("plan", *arguments, words=words)
