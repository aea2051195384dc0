"""benchmarks/training.py: steps that really train, times of what is right."""

import dataclasses
from functools import partial

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.bench import conditions, workloads
from convnext_kernels.bench.cases import QUICK
from convnext_kernels.bench.measure import prepare, results
from convnext_kernels.bench.results import EAGER, OK, OURS, WRONG, is_ours

N, C, SIZE = 2, 16, 7
PLAIN = (EAGER, OURS, "eager, contiguous", f"{OURS}, min", f"{OURS}, balanced")


@pytest.fixture
def script(program):
    return program("training")


@pytest.fixture
def session(script, monkeypatch):
    """Measures with the candidates that need no compiler."""
    monkeypatch.setattr(conditions.Course, "probe", lambda self: self.speeds.append(1.0))
    chosen = tuple(c for c in script.CANDIDATES if c.name in PLAIN)
    return script.session(QUICK, chosen)


def case(script, group, dtype="fp32"):
    """A tiny one in the place of a real one."""
    real = next(c for c in script.cases() if c.group == group and c.dtype == dtype)
    build = partial(workloads.op, group, N, C, SIZE, SIZE, 7 if group == "dwconv" else False)
    tiny = dataclasses.replace(real, what=f"tiny {real.what.split()[-1]}", channels=C, build=build)
    return dataclasses.replace(tiny, build=partial(script.build, tiny))


@pytest.mark.parametrize(("group", "dtype"), [("dwconv", "fp32"), ("dwconv", "bf16"), ("block", "bf16")])
def test_a_case(script, session, group, dtype):
    records = {r.candidate: r for r in session.measure(case(script, group, dtype))}
    assert tuple(records) == (PLAIN if group == "block" else (EAGER, OURS, "eager, contiguous"))
    for record in records.values():
        assert record.status == OK, record.reason
        assert record.times.median > 0
        assert (record.backend is not None) == is_ours(record.candidate)


class Changed(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, y, change):
        ctx.change = change
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.change(dy), None


def test_wrong_gradients_get_no_speed(script, session, monkeypatch):
    """Every setting of ours is held to the strict rule."""
    right, forward = script.Gradient.forward, ck.FusedConvNeXtBlock.forward

    def wrong(self, x, dy):
        return {name: g * (1.0001 if self.ours else 1) for name, g in right(self, x, dy).items()}

    monkeypatch.setattr(script.Gradient, "forward", wrong)
    assert {r.candidate: r.status for r in session.measure(case(script, "dwconv"))} == {
        EAGER: OK,
        OURS: WRONG,
        "eager, contiguous": OK,
    }
    monkeypatch.setattr(
        ck.FusedConvNeXtBlock, "forward", lambda self, x: Changed.apply(forward(self, x), lambda dy: 1.001 * dy)
    )
    for record in session.measure(case(script, "block")):
        assert record.status == (WRONG if is_ours(record.candidate) else OK)


@pytest.mark.parametrize(("change", "status"), [(lambda y: y + 0.05 * y.roll(1, 2), OK), (lambda y: -9 * y, WRONG)])
def test_inaccurate_peers_are_timed_and_nonsense_is_not(script, session, monkeypatch, change, status):
    """`bench` takes more than a hundredth for garbage in fp32."""
    convolve = workloads.EagerDwconv.forward

    def off(self, x):
        y = convolve(self, x)
        return y if x.dtype == torch.float64 else Changed.apply(y, change)

    monkeypatch.setattr(workloads.EagerDwconv, "forward", off)
    records = {r.candidate: r for r in session.measure(case(script, "block"))}
    assert (records[EAGER].status, records[OURS].status) == (status, OK)


def test_steps_start_from_the_same_weights_and_change_them(script):
    prepared = prepare(case(script, "block", "bf16"), "cpu", script.TrainingStep)
    losses = set()
    for candidate in (c for c in script.CANDIDATES if c.name in PLAIN):
        step = candidate.build(prepared)
        before = {name: p.detach().clone() for name, p in step.module.named_parameters()}
        first = results(step)
        losses.add(round(first["output"].item(), 2))
        assert {f"gradient of model.{name}" for name, _ in prepared.eager.model.named_parameters()} < set(first)
        assert "gradient of input 0" in first
        changed = {name for name, p in step.module.named_parameters() if not torch.equal(p, before[name])}
        assert {f"model.{name}.weight" for name in ("dwconv", "pwconv1", "pwconv2")} <= changed, candidate.name
        assert [step().item() for _ in range(8)][-1] < first["output"].item()  # it learns
        _, _, setting = candidate.name.partition("convnext_kernels, ")
        assert not setting or step.module.model.memory == setting
    assert len(losses) == 1
