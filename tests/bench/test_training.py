"""benchmarks/training.py: steps that really train, times of what is right, figures beside the ones asked for."""

import dataclasses
import importlib
import io
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import convnext_kernels as ck
from convnext_kernels.backends.cpu import native
from convnext_kernels.bench import conditions, workloads
from convnext_kernels.bench.cases import FULL, QUICK, STAGES, STANDARD
from convnext_kernels.bench.measure import results
from convnext_kernels.bench.results import EAGER, OK, OURS, WRONG, Record, is_ours, load
from convnext_kernels.bench.work import block, convnext, dwconv
from tests.bench import runs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CEILINGS = {
    "flops": {"fp32": 1e12, "bf16": 2e12, "vector": 5e11},
    "memory": [{"level": "memory", "size": None, "rate": 1e10}],
}
N, C, SIZE = 2, 16, 7
PLAIN = (EAGER, OURS, f"{OURS}, min", f"{OURS}, balanced", "eager, contiguous")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("training")


@pytest.fixture
def session(script, monkeypatch):
    """Measures with the candidates that need no compiler."""
    monkeypatch.setattr(conditions.Course, "probe", lambda self: self.speeds.append(1.0))
    chosen = tuple(c for c in script.CANDIDATES if c.name in PLAIN)
    return script.TrainingSession("cpu", QUICK, CEILINGS, candidates=chosen, garbage=script.GARBAGE)


def case(script, group, dtype="fp32", what=None):
    """A tiny one in the place of a real one."""
    real = next(c for c in script.cases() if c.group == group and c.dtype == dtype)

    def build():
        if group == "dwconv":
            return workloads.dwconv(dwconv(N, C, SIZE, 7), N, C, SIZE, SIZE, 7)
        if group == "block":
            return workloads.block(block(N, C, SIZE), N, C, SIZE, SIZE, False)
        counted = convnext(N, 64, (3, 3, 9, 3), (96, 192, 384, 768), False)
        return workloads.convnext(counted, "torchvision", "convnext_tiny", N, 64)

    return dataclasses.replace(real, what=what or f"tiny {real.what.split()[-1]}", memory=0, channels=C, build=build)


def test_the_table_holds_what_was_asked_for(script):
    names = [c.name for c in script.select(STANDARD)]
    assert len(set(names)) == len(names)
    for dtype in ("fp32", "bf16"):
        for c, size in STAGES:
            at = f"C{c}-{size}x{size}"
            assert f"dwconv/K7-{at}-b8-{dtype}-weight-gradient" in names
            assert {f"block/{v}-{at}-step-b8-{dtype}-training" for v in ("V1", "V2")} <= set(names)
        assert f"model/ConvNeXt-T-224-step-b8-{dtype}-training" in names
    assert "model/ConvNeXt-T-224-step-autocast-b8-bf16-training" in names
    assert {c.channels for c in script.select(QUICK)} == {384}
    assert {c.dtype for c in script.select(FULL, (), ("bf16",))} == {"bf16"}
    assert [c.name for c in script.select(QUICK, ("dwconv/*C96*bf16*",))] == [
        "dwconv/K7-C96-56x56-b8-bf16-weight-gradient"
    ]
    with pytest.raises(ValueError, match="no case of fp32 and bf16 has 'conv9'"):
        script.select(QUICK, ("conv9",))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("group", ["dwconv", "block"])
def test_a_case(script, session, group, dtype):
    records = {r.candidate: r for r in session.measure(case(script, group, dtype))}
    assert tuple(records) == (PLAIN if group == "block" else (EAGER, OURS, "eager, contiguous"))
    for record in records.values():
        assert record.status == OK, record.reason
        assert record.error <= record.allowed_error
        assert record.times.median > 0
        assert record.saved_bytes is None
        assert (record.backend is not None) == is_ours(record.candidate)


def test_a_wrong_weight_gradient_gets_no_speed(script, session, monkeypatch):
    """Every setting of ours is held to the strict rule, peers to the loose one."""
    right = script._our_gradient

    def wrong(*arguments):
        weight, bias = right(*arguments)
        return weight, bias * 1.0001

    monkeypatch.setattr(script, "_our_gradient", wrong)
    chosen = [c for c in script.CANDIDATES if c.name == EAGER]
    for name in (OURS, f"{OURS}, another setting", "a peer"):
        chosen.append(dataclasses.replace(chosen[0], name=name, build=lambda p: lambda: as_dict(wrong(*arguments(p)))))

    def arguments(prepared):
        x = prepared.inputs[0]
        return script.target_of(x, "dwconv"), x, prepared.eager.weight.detach(), prepared.eager.bias.detach()

    def as_dict(pair):
        return dict(zip(("gradient of weight", "gradient of bias"), pair, strict=True))

    session.candidates = tuple(chosen)
    records = [(r.candidate, r.status) for r in session.measure(case(script, "dwconv"))]
    assert records == [(EAGER, OK), (OURS, WRONG), (f"{OURS}, another setting", WRONG), ("a peer", WRONG)]


def test_a_wrong_gradient_of_the_block_gets_no_speed(script, session, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.001

    forward = ck.FusedConvNeXtBlock.forward
    monkeypatch.setattr(ck.FusedConvNeXtBlock, "forward", lambda self, x: Wrong.apply(forward(self, x)))
    records = {r.candidate: r for r in session.measure(case(script, "block"))}
    assert records[EAGER].status == OK
    for name in (OURS, f"{OURS}, min", f"{OURS}, balanced"):
        assert records[name].status == WRONG
        assert records[name].reason.startswith("gradient of ")


@pytest.mark.parametrize(("change", "status"), [(lambda y: y + 0.05 * y.roll(1, 2), OK), (lambda y: -9 * y, WRONG)])
def test_inaccurate_peers_are_timed_and_nonsense_is_not(script, session, monkeypatch, change, status):
    """`bench` takes more than a hundredth for garbage in fp32."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return change(dy)

    convolve = workloads.EagerDwconv.forward

    def off(self, x):
        y = convolve(self, x)
        return y if x.dtype == torch.float64 else Changed.apply(y)

    monkeypatch.setattr(workloads.EagerDwconv, "forward", off)
    records = {r.candidate: r for r in session.measure(case(script, "block"))}
    assert records[EAGER].status == status, records[EAGER]
    assert records[EAGER].error > 0.01
    assert records[OURS].status == OK


def test_a_step_changes_the_weights_and_a_restart_brings_them_back(script):
    for candidate in (c for c in script.CANDIDATES if c.name in PLAIN):
        prepared, _ = script.TrainingSession("cpu", QUICK, {}).prepare(case(script, "block", "bf16"))
        step = candidate.build(prepared)
        first = results(step)
        assert {f"gradient of model.{name}" for name, _ in prepared.eager.named_parameters()} < set(first)
        assert "gradient of input 0" in first
        changed = {name for name, p in step.module.named_parameters() if not torch.equal(p, step.first[name])}
        assert {f"model.{name}.weight" for name in ("dwconv", "pwconv1", "pwconv2")} <= changed, candidate.name
        later = [step().item() for _ in range(8)]
        assert later[-1] < first["output"].item()  # it learns
        step.restart()
        again = results(step)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.skipif(native.import_error() is not None, reason="the compiled extension is missing")
def test_packed_weights_are_made_again_every_step(script, monkeypatch):
    """What the step is there to time."""
    from convnext_kernels.backends.cpu import packed

    made = []
    monkeypatch.setattr(packed, "_entries", Recording(made))
    prepared, _ = script.TrainingSession("cpu", QUICK, {}).prepare(case(script, "block", "bf16"))
    step = script._our_step(None)(prepared)
    with ck.use_backend("cpu"):
        counts = []
        for _ in range(3):
            step()
            counts.append(len(made))
    assert 0 < counts[0] < counts[1] < counts[2]


class Recording(dict):
    """Notes every entry that is set."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def __setitem__(self, key, value):
        self.made.append(key)
        super().__setitem__(key, value)


def test_all_candidates_start_from_the_same_weights(script):
    """Building and running one, as measuring does, leaves nothing behind for the next."""
    prepared, _ = script.TrainingSession("cpu", QUICK, {}).prepare(case(script, "block"))
    losses = set()
    for candidate in (c for c in script.CANDIDATES if c.name in PLAIN):
        step = candidate.build(prepared)
        losses.add(round(step().item(), 5))
        step()
    assert len(losses) == 1


def test_memory_is_set(script):
    prepared, _ = script.TrainingSession("cpu", QUICK, {}).prepare(case(script, "block"))
    for memory in ("min", "balanced"):
        step = script._our_step(memory)(prepared)
        assert step.module.model.memory == memory
    assert prepared.ours.memory == "auto"


def test_by_hand_is_the_same_gradient(script):
    x, dy = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    weight = torch.randn(6, 1, 7, 7, dtype=torch.float64)
    expected = script.convolution_gradient(dy, x, weight)
    for function in (script.sums_of_shifts, script.sums_of_windows):
        for found, true in zip(function(dy, x, weight), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)  # they add in fp32


def test_autocast_keeps_parameters_and_the_accelerated_model_is_used(script):
    real = case(script, "model", "bf16", what=f"ConvNeXt-T step {script.AUTOCAST}")
    prepared, _ = script.TrainingSession("cpu", QUICK, {}).prepare(real)
    assert prepared.case.dtype == "bf16"
    step = script._our_step(None)(prepared)
    assert step.autocast
    assert {p.dtype for p in step.module.parameters()} == {torch.float32}
    assert step.forward().isfinite()
    assert not step.leaves[0].requires_grad
    assert ck.acceleration_report(step.module)


def record(candidate, median, group="block", dtype="bf16", what="V1 C96 56x56 step", **changes):
    fields = {"status": OK, "times": None if median is None else runs.times(median, 0)} | changes
    name = f"{group}/{what.replace(' ', '-')}-b8-{dtype}-training"
    return Record(name, group, what, 8, dtype, "training", candidate, error=1e-3, allowed_error=1e-2, **fields)


def shown(script, *records):
    run = runs.full_run(records=list(records))
    out = Console(width=240, record=True, file=io.StringIO())
    missed = script.show(run, out)
    return missed, " ".join(out.export_text().split())


@pytest.mark.parametrize(("median", "verdict"), [(4.0, "met"), (4.1, "MISSED")])
def test_figures(script, median, verdict):
    records = [
        record(EAGER, 14.0),
        record("eager, contiguous", 11.0),
        record("torch.compile", 10.0),
        record(OURS, median),
        record(f"{OURS}, min", 1.0),  # may be faster: it is not what the figure is about, and no peer
        record("by hand, shifts", 5.0),  # neither
    ]
    missed, text = shown(script, *records)
    value = 10 / median
    assert len(missed) == (verdict == "MISSED")
    assert f"auto torch.compile {value:.2f}x {value:.2f}-{value:.2f} {value:.2f}x 2.5x {verdict}" in text
    assert f"1 targets, {len(missed)} missed" in text
    assert "min torch.compile 10.00x" in text


def test_what_was_asked_for(script):
    def limit(group, dtype, candidate=OURS, what="x"):
        return script.target_ratio(record(candidate, 1.0, group, dtype, what))

    assert [limit("dwconv", d) for d in ("bf16", "fp32")] == [20, 5]
    assert [limit("block", d) for d in ("bf16", "fp32")] == [2.5, 1.3]
    assert [limit("model", d) for d in ("bf16", "fp32")] == [2, None]
    assert limit("block", "bf16", f"{OURS}, min") is None
    assert limit("model", "bf16", what="ConvNeXt-T 224 step autocast") is None


def test_without_a_time_a_figure_is_missed_and_the_reason_is_shown(script):
    wrong = record(OURS, None, status=WRONG, reason="gradient of x: error 1")
    missed, text = shown(script, record(EAGER, 10.0), wrong)
    assert len(missed) == 1
    assert "wrong: gradient of x: error 1" in text
    missed, _ = shown(script, record(EAGER, None, status=WRONG, reason="r"), record(OURS, 1.0))
    assert len(missed) == 1


def test_inaccurate_peers_are_named(script):
    _, text = shown(script, dataclasses.replace(record(EAGER, 10.0), error=0.378), record(OURS, 1.0))
    assert "eager: timed, but a gradient is off by 38%" in text


@pytest.mark.parametrize(("median", "status"), [(10.0, 1), (0.01, 0)])
def test_command(script, monkeypatch, tmp_path, median, status):
    monkeypatch.setattr(script, "TrainingSession", fake_session(script, median))
    monkeypatch.setattr("convnext_kernels.cli.bench.start", lambda device, mode: runs.full_run(records=[], mode=mode))
    file = tmp_path / "training.json"
    arguments = ["--only", "block/V1-C384*bf16*", "--json", str(file)]
    done = CliRunner().invoke(script.main, [*arguments, "--check"], catch_exceptions=False)
    assert done.exit_code == status
    assert "V1 C384 14x14 step bf16" in done.output
    assert "Example Xeon 6 @ 2.1 GHz, 2 cores, 2 threads, PyTorch 2.14.1, commit 0123456789ab" in done.output
    run = load(file)  # the format of `convnext-kernels bench`
    assert run.complete
    assert {r.case for r in run.records} == {"block/V1-C384-14x14-step-b8-bf16-training"}
    assert run.conditions["optimiser"] == script.OPTIMISER
    assert json.loads(file.read_text())["machine"]["libraries"]["torch"] == "2.14.1"
    assert CliRunner().invoke(script.main, arguments).exit_code == 0


def fake_session(script, median):
    class Fake:
        course = conditions.Course()

        def __init__(self, *arguments, **settings):
            assert settings["garbage"] == script.GARBAGE

        def measure(self, case):
            return [record(EAGER, 10.0, what=case.what), record(OURS, median, what=case.what)]

    return Fake


def test_command_refuses_what_it_does_not_know(script):
    done = CliRunner().invoke(script.main, ["--only", "conv9"])
    assert done.exit_code == 1
    assert "no case of fp32 and bf16 has 'conv9'" in done.output
    done = CliRunner().invoke(script.main, ["--list", "--dtype", "fp32"])
    assert "model/ConvNeXt-T-224-step-b8-fp32-training" in done.output
    assert "bf16" not in done.output
