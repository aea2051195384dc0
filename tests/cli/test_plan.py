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


def test_one_of_timm_in_training(run):
    arguments = ("--model", "timm/convnextv2_atto", "--gpu", "rtx 4090", "--batch", 1, "--dtype", "fp32", "--training")
    result = run("plan", *arguments)
    assert result.exit_code == 0, result.output
    assert "timm/convnextv2_atto on RTX4090, batch 1, 224 x 224, fp32, forward and backward: predicted" in result.output
    assert re.findall(r"block V2 .*? k7 +(\d+) ", result.output) == ["2", "2", "6", "2"]


def test_several_gpus_and_batches(run):
    result = run("plan", "--gpu", "A100", "--gpu", "RTX 4090", "--batch", 1, "--batch", 128, "--training")
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines() if "|" in line]
    head, rows = lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert head[:3] == ["GPU", "batch", "block"]
    assert len(rows) == 2 * 2 * 4  # blocks only, one line for each stage
    assert [(row["GPU"], row["batch"]) for row in rows[::4]] == [
        *(("A100", "1"), ("A100", "128"), ("RTX4090", "1"), ("RTX4090", "128")),
    ]
    for row in rows:
        assert float(row["us"]) > float(row["limit us"])
        assert "mlp backward: " in row["plan"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "convnext_tiney"), ("--model convnext_tiney", "close: ", "convnext_tiny")),
        (("--model", "resnet18"), ("torchvision/resnet18", "nothing to accelerate")),
    ],
)
def test_what_is_wrong_gets_one_line(fails, arguments, words):
    fails("plan", *arguments, words=words)
    fails("plan", "--gpu", "V100", words=("--gpu", "unknown GPU 'V100'", "A100", "RTX5090"), code=2)
