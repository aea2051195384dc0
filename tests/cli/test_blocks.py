import json
import re

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.cli import blocks, models


@pytest.mark.parametrize("use_grn", [False, True])
def test_the_eager_block_is_the_reference(use_grn):
    eager = blocks.eager_block(8, use_grn)
    models.initialise(eager)
    fused = ck.FusedConvNeXtBlock(8, use_grn=use_grn, backend="eager")
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    torch.testing.assert_close(eager(x), fused(x), rtol=1e-5, atol=1e-5)
    assert (eager(x) - x).std() > 0.1


def test_table_and_json(run, tmp_path):
    file = tmp_path / "new" / "blocks.json"
    arguments = ("--batch", "1", "--dtype", "fp32", "--repeats", "2", "--json", file)
    result = run("blocks", *arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"faster than eager in \d of 8 cells", result.stdout)
    assert "…" not in result.stdout  # nothing is cut off at 80 columns
    written = json.loads(file.read_text())
    cells = written["cells"]
    assert {(c["version"], c["channels"], c["size"]) for c in cells} == {
        (version, channels, size) for version in ("V1", "V2") for channels, size in blocks.STAGES
    }
    for cell in cells:
        assert cell["within"]
        assert 0 < cell["eager_ms"]["minimum"] <= cell["eager_ms"]["median"]
        assert cell["speedup"] == cell["eager_ms"]["median"] / cell["accelerated_ms"]["median"]
        assert cell["backend"] in ck.backends()
    assert written["machine"]["convnext_kernels"] == ck.__version__


def test_the_backend_asked_for_serves(run, tmp_path):
    result = run("blocks", "--batch", "1", "--dtype", "bf16", "--repeats", "1", "--backend", "eager")
    assert result.exit_code == 0, result.output
    assert "Only the eager backend served" in result.stdout


def test_no_speed_is_reported_for_wrong_numbers(run, monkeypatch):
    forward = ck.FusedConvNeXtBlock.forward
    monkeypatch.setattr(ck.FusedConvNeXtBlock, "forward", lambda self, x: forward(self, x) * 1.01)
    result = run("blocks", "--batch", "1", "--dtype", "fp32", "--repeats", "1")
    assert result.exit_code == 1
    assert "wrong results in 8 of 8 cells" in result.stderr
    assert "faster than eager in 0 of 8" in result.stdout
    assert not re.search(r"\d\.\d\dx", result.stdout)


def test_bad_options(fails, tmp_path):
    fails("blocks", "--backend", "nope", words=("--backend", "'nope'"))
    fails("blocks", "--repeats", "0", words=("--repeats",), code=2)
    (tmp_path / "file").write_text("")
    fails("blocks", "--json", tmp_path / "file" / "b.json", words=("--json", "cannot be written"))
