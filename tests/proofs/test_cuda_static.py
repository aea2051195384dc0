"""The static report of the CUDA extension: the record and records/cuda_kernels.md."""

import importlib
from pathlib import Path

import pytest

PROOFS = Path(__file__).resolve().parents[2] / "proofs"


def test_the_shipped_record_has_no_spills(monkeypatch):
    """What docs/ says is free of spills, and the page is that of the record."""
    monkeypatch.syspath_prepend(str(PROOFS))
    report = importlib.import_module("cuda_static")
    record = report.read(report.RECORD)
    if record is None:
        pytest.skip("nothing is recorded yet")
    assert report.spilling(record.rows) == []
    assert report.page(record) == report.PAGE.read_text(encoding="utf-8")
