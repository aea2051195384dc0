import dataclasses
import math

import pytest

from convnext_kernels.bench import results
from convnext_kernels.bench.results import EAGER, OK, OURS, UNAVAILABLE, WRONG, Record, Run, Times


def record(candidate, *rounds, **values):
    times = Times(rounds) if rounds else None
    status = OK if rounds else UNAVAILABLE
    return Record("block/x", "block", "x", 2, "fp32", "forward", candidate, status, times=times, **values)


def run(*records):
    return Run(
        {"cpu": {"name": "c"}}, {"warnings": []}, {}, "cpu", "quick", "2026-01-01T00:00:00+00:00", 1.0, True, [*records]
    )


def test_save_and_load(tmp_path):
    whole = run(record(EAGER, (2.0, 2.123456789), (3.0,), flops=10, error=math.nan), record("peer", reason="absent"))
    whole.records[0] = dataclasses.replace(whole.records[0], status=WRONG)
    whole.checks.append(record("cpu", error=1e-7, allowed_error=1e-6))
    whole.not_run.append("no GPU")
    file = tmp_path / "new" / "results.json"
    results.save(whole, file)
    assert "NaN" not in file.read_text()  # JSON has no NaN
    loaded = results.load(file)
    assert loaded.records[0].times.rounds == ((2.0, 2.1235), (3.0,))  # five digits
    assert math.isnan(loaded.records[0].error)
    assert loaded.records[1] == whole.records[1]
    assert loaded.checks == whole.checks
    assert dataclasses.replace(loaded, records=[]) == dataclasses.replace(whole, records=[])
    assert [p.name for p in file.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 0}', '{"format": 1}', "null", '{"format": 1, "records": [{}], "checks": []}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json: not a result file"):
        results.load(file)


def test_times():
    times = Times(((2.0, 4.0), (5.0, 7.0)))
    assert (times.minimum, times.median) == (2.0, 4.5)
    assert times.spread == pytest.approx(1.5 / 4.5)


def test_ratio_and_best_peer():
    case = {
        r.candidate: r
        for r in (record(EAGER, (4.0,), (6.0,)), record(OURS, (2.0,), (2.0,)), record("p", (3.0,), (3.0,)))
    }
    assert results.ratio(case) == 2.5
    assert results.best_peer(case) == "p"
    assert results.ratio(case, "absent") is None
    assert results.best_peer({OURS: case[OURS]}) is None
