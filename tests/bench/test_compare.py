import dataclasses
import math

import pytest
from click.testing import CliRunner

from convnext_kernels.bench.results import EAGER, OURS, Times, save
from convnext_kernels.cli.compare import CONTROLS, command, compare, control, differences
from tests.bench import runs

CASE = "block/V1-C384-14x14-b1-fp32-forward"


def run_of(*medians, noise=0.0, **changes):
    """A run of one case in which ours has these medians, one for each round."""
    run = runs.full_run(**{"machine": runs.machine(), **changes})
    run.records = [r for r in run.records if r.case == CASE and r.candidate in (OURS, EAGER)]
    times = Times(tuple((m * (1 - noise), m, m * (1 + noise)) for m in medians))
    return runs.replace(run, CASE, OURS, times=times)


def of_ours(a, b):
    return next(change for change in compare(a, b) if change.b.candidate == OURS)


@pytest.mark.parametrize(("after", "verdict"), [(1.019, "within noise"), (1.03, "slower"), (0.97, "faster")])
def test_the_floor_is_two_percent(after, verdict):
    found = of_ours(run_of(1.0, 1.0), run_of(after, after))
    assert (found.verdict, found.noise, found.change) == (verdict, 0.02, pytest.approx(after - 1))


def test_noise_is_the_sum_of_the_spreads_and_not_what_varies_within_a_round():
    a = run_of(0.96, 1.0, 1.04)
    found = of_ours(a, run_of(1.05, 1.1, 1.15))  # spreads 0.04 and 0.05 / 1.1
    assert (found.verdict, found.noise) == ("slower", pytest.approx(0.04 + 0.05 / 1.1))
    assert of_ours(a, run_of(1.03, 1.08, 1.13)).verdict == "within noise"
    assert of_ours(run_of(1.0, 1.0, noise=0.3), run_of(1.1, 1.1, noise=0.3)).verdict == "slower"


def moved(run, factor, ours=1.0):
    """The run on a machine that is `factor` times as slow, with a kernel of ours that is `ours` times as slow."""
    records = []
    for r in run.records:
        scale = factor * (ours if r.candidate == OURS else 1)
        times = r.times and Times(tuple(tuple(call * scale for call in calls) for calls in r.times.rounds))
        records.append(dataclasses.replace(r, times=times))
    return dataclasses.replace(run, records=records)


def test_what_moves_the_peers_too_is_noise_and_what_moves_ours_alone_is_a_change():
    run = runs.full_run()
    assert control(run, run) == 0
    slow = moved(run, 1.5, ours=0.99)
    assert control(run, slow) == pytest.approx(0.5)
    assert {c.verdict for c in compare(run, slow) if c.b.candidate == OURS} == {"within noise"}
    noisy = moved(run, 1.1, ours=3.0)
    verdicts = {c.b.candidate == OURS: c.verdict for c in compare(run, noisy) if c.change is not None}
    assert verdicts == {True: "slower", False: "within noise"}
    peers = [r for r in run.records if r.candidate != OURS and r.times]
    for count, expected in ((CONTROLS - 1, 0), (CONTROLS, 1)):
        few = dataclasses.replace(run, records=peers[:count])
        assert control(few, moved(few, 2.0)) == pytest.approx(expected)


@pytest.mark.parametrize("status", ["wrong", "failed", "unavailable"])
def test_a_status_that_changed(status):
    good = run_of(1.0)
    bad = runs.replace(good, CASE, OURS, status=status, reason="why", times=None, error=math.nan)
    assert of_ours(good, bad).verdict == f"ok > {status}"
    assert of_ours(bad, good).verdict == f"{status} > ok"
    assert [change.b.candidate for change in compare(bad, bad)] == [EAGER]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": runs.machine(cpu="Other")}, ("CPU", "Example Xeon 6", "Other")),
        ({"machine": runs.machine(torch="2.6.0")}, ("PyTorch", "2.14.1", "2.6.0")),
        ({"conditions": {"threads": 8}}, ("threads", "2 in A", "8 in B")),
        ({"mode": "quick"}, ("mode", "standard in A", "quick in B")),
        ({"device": "cuda"}, ("device", "cpu in A", "cuda in B")),
        ({"complete": False}, ("run B is incomplete",)),
        ({"machine": runs.machine(gpus=("H200",))}, None),  # the GPU was not used
    ],
)
def test_differences(changes, words):
    lines = differences(run_of(1.0), run_of(1.0, **changes))
    assert len(lines) == (words is not None)
    assert all(word in lines[0] for word in words or ())


@pytest.fixture
def call(tmp_path):
    """Save runs and call the command with them."""

    def run(a, b):
        save(a, tmp_path / "a.json")
        save(b, tmp_path / "b.json")
        result = CliRunner().invoke(command, [str(tmp_path / "a.json"), str(tmp_path / "b.json")])
        assert result.exit_code == 0, result.output
        return result

    return run


def test_command(call):
    shown = call(run_of(1.0, 1.0), run_of(1.5, 1.5, complete=False)).output
    for words in ("1.50x slower", "Over all times B is 1.22 times slower than A", "warning: run B is incomplete"):
        assert words in shown
    assert "1 of 2 times agree within the noise" in shown
    assert " eager " not in shown
    assert "warning" not in call(run_of(1.0, 1.0), run_of(1.0, 1.0)).output
    good = run_of(1.0)
    bad = runs.replace(good, CASE, OURS, status="wrong", reason="[bold]", times=None, error=math.nan)
    shown = call(good, bad).output
    assert "ok > wrong" in shown
