"""The table of mutants follows the code: every old text stands exactly once in its file."""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "proofs")
    sys.modules.pop("cuda_mutants", None)
    import cuda_mutants

    return cuda_mutants.MUTANTS


def test_every_change_fits_the_code(mutants):
    for mutant in mutants:
        text = (ROOT / "csrc" / "cuda" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.name}"
        assert mutant.new != mutant.old


def test_every_kind_and_kernel_file_is_there(mutants):
    kinds = Counter(mutant.kind for mutant in mutants)
    assert set(kinds) == {"barrier", "shared", "stride", "bound", "mask"}
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"launch.cu"}
    assert sources <= {mutant.file for mutant in mutants}
    assert {mutant.kind for mutant in mutants if mutant.quick} >= {"barrier", "shared", "stride"}
