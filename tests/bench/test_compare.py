import dataclasses
import json
import math

import pytest
from click.testing import CliRunner

from convnext_kernels.bench.compare import CONTROLS, Change, compare, control, differences, summary
from convnext_kernels.bench.results import EAGER, OURS, Times, save
from convnext_kernels.cli.compare import command
from tests.bench import runs

CASE = "block/V1-C384-14x14-b1-fp32-forward"


def run_of(*medians, noise=0.0, **changes):
    """A run of one case in which ours has these medians, one for each round."""
    run = runs.full_run(**changes)
    run.records = [r for r in run.records if r.case == CASE and r.candidate in (OURS, EAGER)]
    times = Times(tuple((m * (1 - noise), m, m * (1 + noise)) for m in medians))
    return runs.replace(run, CASE, OURS, times=times)


def of_ours(a, b):
    return next(change for change in compare(a, b) if change.candidate == OURS)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(1.0, "within noise"), (1.019, "within noise"), (1.03, "slower"), (0.97, "faster"), (0.985, "within noise")],
)
def test_the_floor_is_two_percent(after, verdict):
    found = of_ours(run_of(1.0, 1.0), run_of(after, after))
    assert found.verdict == verdict
    assert found.noise == 0.02
    assert found.change == pytest.approx(after - 1)
    assert (found.before, found.after) == (1.0, after)
    assert (found.status_before, found.status_after) == ("ok", "ok")


def test_noise_is_the_sum_of_the_spreads():
    a, b = run_of(0.96, 1.0, 1.04), run_of(1.05, 1.1, 1.15)  # spreads 0.04 and 0.05 / 1.1
    found = of_ours(a, b)
    assert found.noise == pytest.approx(0.04 + 0.05 / 1.1)
    assert found.verdict == "slower"
    assert of_ours(a, run_of(1.03, 1.08, 1.13)).verdict == "within noise"


def test_calls_within_a_round_are_not_noise():
    assert of_ours(run_of(1.0, 1.0, noise=0.3), run_of(1.1, 1.1, noise=0.3)).verdict == "slower"


def moved(run, factor, ours=1.0):
    """The run on a machine that is `factor` times as slow, with a kernel of ours that is `ours` times as slow."""
    records = []
    for r in run.records:
        scale = factor * (ours if r.candidate == OURS else 1)
        times = r.times and Times(tuple(tuple(call * scale for call in calls) for calls in r.times.rounds))
        records.append(dataclasses.replace(r, times=times))
    return dataclasses.replace(run, records=records)


def test_what_moves_the_peers_too_is_noise():
    run = runs.full_run()
    assert control(run, run) == 0
    slow = moved(run, 1.5, ours=0.99)
    assert control(run, slow) == pytest.approx(0.5)
    assert {c.verdict for c in compare(run, slow) if c.candidate == OURS} <= {"within noise", "no times"}


def test_what_moves_ours_alone_is_a_change():
    run = runs.full_run()
    noisy = moved(run, 1.1, ours=3.0)
    assert control(run, noisy) == pytest.approx(0.1)
    verdicts = {c.candidate == OURS: c.verdict for c in compare(run, noisy) if c.change is not None}
    assert verdicts == {True: "slower", False: "within noise"}


def test_too_few_peers_are_no_control():
    run = runs.full_run()
    peers = [r for r in run.records if r.candidate != OURS and r.times]
    few = dataclasses.replace(run, records=peers[: CONTROLS - 1])
    assert control(few, moved(few, 2.0)) == 0
    enough = dataclasses.replace(run, records=peers[:CONTROLS])
    assert control(enough, moved(enough, 2.0)) == pytest.approx(1.0)


def test_the_same_run_agrees_with_itself():
    run = runs.odd_run()
    changes = compare(run, run)
    assert {change.verdict for change in changes} == {"within noise", "no times"}
    assert [(change.case, change.candidate) for change in changes] == [(r.case, r.candidate) for r in run.records]
    summed = summary(changes)
    assert summed["agree"] == summed["timed"] == sum(r.times is not None for r in run.records)
    assert summed["mean"] == pytest.approx(1)


def test_what_is_in_one_run_only():
    a, b = run_of(1.0), run_of(1.0)
    b.records = [dataclasses.replace(r, case="block/new-b1-fp32-forward") for r in b.records]
    verdicts = {(change.case, change.verdict) for change in compare(a, b)}
    assert verdicts == {(CASE, "only in A"), ("block/new-b1-fp32-forward", "only in B")}
    found = compare(a, b)[-1]
    assert (found.before, found.change, found.noise, found.status_before) == (None, None, None, None)
    assert found.status_after == "ok"


@pytest.mark.parametrize("status", ["wrong", "failed", "unavailable"])
def test_a_status_that_changed(status):
    good = run_of(1.0)
    bad = runs.replace(good, CASE, OURS, status=status, reason="why", times=None, error=math.nan)
    assert of_ours(good, bad).verdict == of_ours(bad, good).verdict == "status changed"
    assert of_ours(good, bad).status_after == status
    assert of_ours(bad, bad).verdict == "no times"
    assert [change.candidate for change in compare(good, bad) if change.gone_bad] == [OURS]
    assert not any(change.gone_bad for change in compare(bad, good))


def test_empty_runs():
    empty = runs.full_run(records=[])
    assert compare(empty, empty) == []
    assert summary([])["mean"] is None


def test_summary_counts():
    change = Change("c", "eager", 1.0, 2.0, 1.0, 0.02, "slower", "ok", "ok")
    summed = summary([change, dataclasses.replace(change, change=-0.5, verdict="faster")])
    assert summed["counts"] == {"slower": 1, "faster": 1}
    assert (summed["timed"], summed["agree"]) == (2, 0)
    assert summed["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": runs.machine(cpu="Other")}, ("CPU", "Example Xeon", "Other")),
        ({"machine": runs.machine(torch="2.6.0")}, ("PyTorch", "2.14.1", "2.6.0")),
        ({"conditions": {"threads": 8}}, ("threads", "2 in A", "8 in B")),
        ({"mode": "quick"}, ("mode", "full in A", "quick in B")),
        ({"device": "cuda"}, ("device", "cpu in A", "cuda in B")),
        ({"complete": False}, ("run B is incomplete",)),
    ],
)
def test_differences(changes, words):
    (line,) = differences(run_of(1.0), run_of(1.0, **changes))
    for word in words:
        assert word in line


def test_a_gpu_matters_where_it_was_measured():
    one, two = (runs.machine(gpus=(name,)) for name in ("H100", "H200"))
    assert differences(run_of(1.0, machine=one), run_of(1.0, machine=two)) == []
    (line,) = differences(run_of(1.0, machine=one, device="cuda"), run_of(1.0, machine=two, device="cuda"))
    assert "H100 in A, H200 in B" in line


@pytest.fixture
def call(tmp_path):
    """Save runs and call the command with them."""

    def run(a, b, *arguments):
        save(a, tmp_path / "a.json")
        save(b, tmp_path / "b.json")
        files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
        return CliRunner().invoke(command, [*files, *map(str, arguments)])

    return run


def test_command_shows_what_moved(call):
    result = call(run_of(1.0, 1.0), run_of(1.5, 1.5, complete=False))
    assert result.exit_code == 0, result.output
    assert "1.50x slower" in result.output
    assert "Over all times B is 1.22 times slower than A" in result.output
    assert "V1-C384-14x14-b1-fp32" in result.output
    assert "1 of 2 times agree within the noise" in result.output
    assert "warning: run B is incomplete" in result.output
    assert " eager " not in result.output


def test_command_shows_all(call):
    result = call(run_of(1.0, 1.0), run_of(1.0, 1.0), "--all")
    assert result.exit_code == 0, result.output
    assert " eager " in result.output
    assert "2 of 2 times agree" in result.output
    assert "warning" not in result.output


def test_command_names_what_lost_its_speed(call):
    good = run_of(1.0)
    bad = runs.replace(good, CASE, OURS, status="wrong", reason="[bold]", times=None, error=math.nan)
    result = call(good, bad)
    assert "ok > wrong" in result.output
    assert "no times in B any more" in result.output


def test_command_with_nothing_to_compare(call):
    result = call(runs.full_run(records=[]), runs.full_run(records=[]))
    assert result.exit_code == 0, result.output
    assert "No candidate has times in both runs" in result.output


def test_command_fits_80_columns(call):
    result = call(runs.full_run(), runs.full_run(seed=1), "--all")
    rows = [line for line in result.output.splitlines() if "OpenVINO" in line or "ours" in line]
    assert rows
    assert [line for line in rows if len(line) > 80 or "…" in line] == []


def test_json(call):
    result = call(run_of(1.0), run_of(2.0, mode="quick"), "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == "warning: mode differs: full in A, quick in B\n"
    values = json.loads(result.stdout)
    assert values["warnings"] == ["mode differs: full in A, quick in B"]
    assert values["summary"]["counts"] == {"within noise": 1, "slower": 1}
    assert {c["candidate"]: c["verdict"] for c in values["changes"]} == {EAGER: "within noise", OURS: "slower"}


def test_errors_are_one_line_and_name_the_file(call, tmp_path):
    good, bad = tmp_path / "a.json", tmp_path / "bad.json"
    save(run_of(1.0), good)
    for content in ("", "nonsense", "[]", "{}", '{"format": 99}', '{"format": 1, "records": [{}]}'):
        bad.write_text(content)
        result = CliRunner().invoke(command, [str(good), str(bad)])
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert str(bad) in line
        assert "not a result file" in line
    bad.write_bytes(b"\xff\xfe\x00")
    for file, words in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory"), (bad, "not a result file")):
        result = CliRunner().invoke(command, [str(file), str(good)])
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert str(file) in line
        assert words in line
