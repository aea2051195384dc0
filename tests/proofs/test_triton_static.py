"""The static report: kernels are compiled for GPUs that are not there, and worse ones are named."""

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="the static report compiles Triton kernels")
PROOFS = Path(__file__).resolve().parents[2] / "proofs"


@pytest.fixture(scope="module", autouse=True)
def _path(tmp_path_factory):
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROOFS))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def report(_path):
    return importlib.import_module("triton_static")


@pytest.fixture(scope="module")
def row(report):
    case = next(c for c in report.COMPILED if c.op == "reduce")
    (found,), failure = report.compile_case((90, case, False))
    assert failure is None
    return found


def test_every_architecture_compiles(report):
    case = next(c for c in report.COMPILED if c.op == "reduce")
    for arch in report.ARCHS:
        rows, failure = report.compile_case((arch, case, False))
        assert failure is None
        assert [r.arch for r in rows] == [arch]
        assert rows[0].statics.instructions > 100
        assert rows[0].statics.spill_stores == 0
        assert report.wrong(rows[0]) == []


def test_driver_is_put_back(report):
    from triton.runtime import driver

    before = driver._active
    with report.compile_only(80) as launches:
        assert driver.active.get_active_torch_device() == torch.device("meta")
    assert driver._active is before
    assert launches == []


def test_a_second_time_comes_from_the_disk(report, row):
    case = next(c for c in report.COMPILED if c.op == "reduce")
    (again,), _ = report.compile_case((90, case, False))
    assert again == row  # the seconds that compiling took the first time included


def test_a_failing_launcher_is_named(report):
    rows, failure = report.compile_case((90, replace(report.COMPILED[0], op="no_such_op"), False))
    assert rows == []
    assert "sm_90 no_such_op" in failure


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spill_stores": 8}, "spill stores 8 bytes, recorded 0"),
        ({"spill_loads": 4}, "spill loads 4 bytes, recorded 0"),
        ({"stack": 16}, "stack 16 bytes, recorded 0"),
        ({"ctas": 1}, "1 CTAs per multiprocessor, recorded"),
        ({"shared": 300000}, "300000 bytes of shared memory, limit 232448"),
        ({"tensor_memory": 1024}, "1024 columns of tensor memory, limit 512"),
        ({"instructions": 3}, "an empty stub of 3 instructions"),
    ],
)
def test_a_worse_kernel_fails(report, row, change, reason):
    worse = replace(row, statics=replace(row.statics, **change))
    failures, _ = report.check({worse.key: worse}, {row.key: row})
    assert any(reason in line and row.key in line for line in failures), failures


def test_lost_tensor_cores_fail(report, row):
    recorded = replace(row, statics=replace(row.statics, tensor={"HGMMA": 4}))
    assert any("HGMMA" in line for line in report.check({row.key: row}, {row.key: recorded})[0])
    matrix = replace(row, matrix=True)
    assert any("without tensor cores" in line for line in report.check({row.key: matrix}, {})[0])


def test_an_equal_kernel_passes(report, row):
    assert report.check({row.key: row}, {row.key: row}) == ([], [])
    assert report.check({row.key: row}, {}) == ([], [f"not recorded yet: {row.key}"])


def test_record_round_trip(report, row, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RECORD", tmp_path / "kernels.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "kernels.md")
    report.write({row.key: row})
    assert report.read(tmp_path / "kernels.json") == {row.key: row}
    assert "| sum_partials | 90 | 1 |" in (tmp_path / "kernels.md").read_text()
