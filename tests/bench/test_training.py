"""Cases of training: steps that really train, times of what is right."""

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.bench import training, workloads
from convnext_kernels.bench.candidates import CANDIDATES
from convnext_kernels.bench.cases import FULL, QUICK, STAGES, STANDARD, STEP, WEIGHT_GRADIENT, Case, select
from convnext_kernels.bench.measure import Session, prepare, results
from convnext_kernels.bench.results import EAGER, OK, OURS, WRONG, is_ours

N, C, SIZE = 2, 16, 7
PLAIN = (EAGER, OURS, "eager, contiguous", f"{OURS}, min", f"{OURS}, balanced")


@pytest.fixture
def session():
    """Measures with the candidates that need no compiler."""
    return Session("cpu", QUICK, candidates=tuple(c for c in CANDIDATES if c.name in PLAIN))


def case(group, dtype="fp32"):
    """A tiny one in the place of a real one."""
    build = {
        "dwconv": lambda: training.weight_gradient(lambda: workloads.op("dwconv", N, C, SIZE, SIZE, 7)),
        "block": lambda: training.step(lambda: workloads.op("block", N, C, SIZE, SIZE, False), False),
    }[group]
    return Case(group, "tiny", N, dtype, WEIGHT_GRADIENT if group == "dwconv" else STEP, FULL, build, C)


def test_the_table_holds_what_was_asked_for():
    names = {c.name for c in select(FULL)} - {c.name for c in select(STANDARD)}
    for dtype in ("fp32", "bf16"):
        for c, size in STAGES:
            at = f"C{c}-{size}x{size}"
            assert f"dwconv/K7-{at}-b8-{dtype}-weight-gradient" in names
            assert {f"block/{v}-{at}-b8-{dtype}-step" for v in ("V1", "V2")} <= names
        assert f"model/ConvNeXt-T-224-b8-{dtype}-step" in names
    assert "model/ConvNeXt-T-224-autocast-b8-bf16-step" in names
    (only,) = select(QUICK, ("dwconv/*C96*bf16-weight*",))
    assert only.name == "dwconv/K7-C96-56x56-b8-bf16-weight-gradient"
    assert not {c.direction for c in select(FULL, (), "cuda")} & {STEP, WEIGHT_GRADIENT}


@pytest.mark.parametrize(("group", "dtype"), [("dwconv", "fp32"), ("dwconv", "bf16"), ("block", "bf16")])
def test_a_case(session, group, dtype):
    records = {r.candidate: r for r in session.measure(case(group, dtype))}
    assert tuple(records) == (PLAIN if group == "block" else (EAGER, OURS, "eager, contiguous"))
    for record in records.values():
        assert record.status == OK, record.reason
        assert record.times.median > 0


class Changed(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, y, change):
        ctx.change = change
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.change(dy), None


def test_wrong_gradients_get_no_speed(session, monkeypatch):
    """Every setting of ours is held to the strict rule."""
    right, forward = training.Gradient.forward, ck.FusedConvNeXtBlock.forward

    def wrong(self, x, dy):
        return {name: g * (1.0001 if self.ours else 1) for name, g in right(self, x, dy).items()}

    monkeypatch.setattr(training.Gradient, "forward", wrong)
    assert {r.candidate: r.status for r in session.measure(case("dwconv"))} == {
        EAGER: OK,
        OURS: WRONG,
        "eager, contiguous": OK,
    }
    monkeypatch.setattr(
        ck.FusedConvNeXtBlock, "forward", lambda self, x: Changed.apply(forward(self, x), lambda dy: 1.001 * dy)
    )
    for record in session.measure(case("block")):
        assert record.status == (WRONG if is_ours(record.candidate) else OK)


@pytest.mark.parametrize(("change", "status"), [(lambda y: y + 0.05 * y.roll(1, 2), OK), (lambda y: -9 * y, WRONG)])
def test_inaccurate_peers_are_timed_and_nonsense_is_not(session, monkeypatch, change, status):
    """`bench` takes more than a hundredth for garbage in fp32."""
    convolve = workloads.EagerDwconv.forward

    def off(self, x):
        y = convolve(self, x)
        return y if x.dtype == torch.float64 else Changed.apply(y, change)

    monkeypatch.setattr(workloads.EagerDwconv, "forward", off)
    records = {r.candidate: r for r in session.measure(case("block"))}
    assert (records[EAGER].status, records[OURS].status) == (status, OK)


def test_steps_start_from_the_same_weights_and_change_them():
    prepared = prepare(case("block", "bf16"), "cpu")
    losses = set()
    for candidate in (c for c in CANDIDATES if c.name in PLAIN):
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
