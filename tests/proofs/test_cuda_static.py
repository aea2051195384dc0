"""The static report of the CUDA extension: names, the record, records/cuda_kernels.md, and what fails the check."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

PROOFS = Path(__file__).resolve().parents[2] / "proofs"


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROOFS))
        yield importlib.import_module("cuda_static")


@pytest.fixture
def record(report):
    row = report.Row("one_kernel<bf16, 7>", 80, 40, 0, 0, 0, 0, 200, 0.5, {"HMMA": 4})
    rows = [row, replace(row, arch=90, registers=48), replace(row, kernel="one_kernel<fp32, 7>", tensor={})]
    rows += [replace(row, kernel="two_kernel", registers=20, tensor={})]
    return report.Record("13.0.88", {row.key: row for row in sorted(rows, key=lambda row: row.key)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stack": 8}, "one_kernel<bf16, 7> sm_80: 8 bytes of stack"),
        ({"spill_loads": 4}, "one_kernel<bf16, 7> sm_80: 0 bytes of stack, spills of 0 + 4 bytes"),
        ({"tensor": {}}, "one_kernel<bf16, 7> sm_80: no tensor-core instruction, recorded HMMA"),
        ({"kernel": "three_kernel"}, "three_kernel sm_80: not in the record"),
        ({"arch": 86}, "one_kernel<bf16, 7> sm_80: in the record, but not in the extension"),
    ],
)
def test_a_worse_extension_fails(report, record, change, reason):
    first = record.rows["one_kernel<bf16, 7> sm_80"]
    rows = [replace(row, **change) if row is first else row for row in record.rows.values()]
    failures, _ = report.check({row.key: row for row in rows}, "13.0.88", record)
    assert any(line.startswith(reason) for line in failures), failures


def test_the_shipped_record_has_no_spills(report):
    """What docs/ says is free of spills, and the page is that of the record."""
    record = report.read(report.RECORD)
    if record is None:
        pytest.skip("nothing is recorded yet")
    assert report.spilling(record.rows) == []
    assert report.page(record) == report.PAGE.read_text(encoding="utf-8")
