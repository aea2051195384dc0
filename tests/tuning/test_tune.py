"""`tune`: what it times, what it keeps, and that calls take it. The clock is replaced, except where a test says so."""

import itertools
import json
import sys

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels import tuning
from convnext_kernels.backends import op_module
from convnext_kernels.backends.cpu import native
from convnext_kernels.bench.timing import Times
from convnext_kernels.tuning import cache
from tests.operators import OPERATORS, expected, expected_gradients, gradients
from tests.shapes import Case
from tests.tolerance import assert_as_good_as_eager

module = sys.modules["convnext_kernels.tuning.tune"]
needs_cpu = pytest.mark.skipif(native.import_error() is not None, reason="compares the cpu backend with eager")


@pytest.fixture
def clock(monkeypatch):
    """Seconds of each candidate: by default eager takes 2, all others 1; each is run once."""
    seconds = {"eager": 2.0}

    def times(functions, device):
        for function in functions.values():
            function()
        return {name: Times(((1e3 * seconds.get(name, 1.0),),)) for name in functions}

    monkeypatch.setattr(module, "_times", times)
    return seconds


@pytest.fixture
def served(monkeypatch):
    """``served(f)``: the (backend, op) pairs that compute what ``f()`` calls."""
    seen = []
    for backend in ("eager", "cpu"):
        for op in ("block", "layernorm"):
            kernel = op_module(backend, op)

            def forward(*arguments, original=kernel.forward, name=(backend, op)):
                seen.append(name)
                return original(*arguments)

            monkeypatch.setattr(kernel, "forward", forward)

    def run(function):
        seen.clear()
        function()
        return set(seen)

    return run


def net(**options):
    return nn.Sequential(ck.FusedConvNeXtBlock(8, **options), ck.LayerNorm2d(8, **options)).eval()


def image(n=1, size=6):
    return torch.randn(n, 8, size, size).to(memory_format=torch.channels_last)


BOTH_CPU = {("cpu", "block"), ("cpu", "layernorm")}
TUNED = {("cpu", "block"), ("eager", "layernorm")}


@needs_cpu
def test_calls_take_what_was_fastest(clock, served, tmp_path, monkeypatch):
    model, x = net(), image(3)
    with torch.no_grad():
        assert served(lambda: model(x)) == BOTH_CPU

    def times(functions, device, everything=module._times):  # eager wins for layernorm, "long" for the block
        found = everything(functions, device)
        if "eager" in functions and served(functions["eager"]) == {("eager", "layernorm")}:
            found["eager"] = Times(((0.5,),))
        return found

    monkeypatch.setattr(module, "_times", times)
    clock["long"] = 0.25
    heard = []
    report = ck.tune(model, x, write=tmp_path / "tuned.json", on_result=heard.append)
    assert heard == report.timings
    assert [(row.op, row.backend, row.plan) for row in report.rows] == [
        ("block", "cpu", "mlp_schedule: long"),
        ("layernorm", "eager", ""),
    ]
    assert "block k7" in str(report)
    with torch.no_grad():
        # at once, for batches of the same class
        assert served(lambda: model(x)) == TUNED
        assert served(lambda: model(image(4))) == TUNED
        for other in (image(5), image(3, size=7), x.contiguous()):
            assert served(lambda other=other: model(other)) == BOTH_CPU
        # a backend by name stays
        assert served(lambda: net(backend="cpu")(x)) == BOTH_CPU
        with ck.use_backend("eager"):
            assert served(lambda: model(x)) == {("eager", "block"), ("eager", "layernorm")}
        # for as many threads, also where the file is read again as by the next process
        torch.set_num_threads(torch.get_num_threads() + 1)
        assert served(lambda: model(x)) == BOTH_CPU
        torch.set_num_threads(torch.get_num_threads() - 1)
        cache.forget()
        assert served(lambda: model(x)) == TUNED
        # a file for other machines of this kind
        monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "another"))
        cache.forget()
        assert served(lambda: model(x)) == BOTH_CPU
        assert tuning.load(tmp_path / "tuned.json") == report.choices
        assert served(lambda: model(x)) == TUNED


@needs_cpu
def test_a_candidate_that_fails_is_one_line(clock, monkeypatch):
    def broken(call):
        raise RuntimeError("out of\nregisters")

    monkeypatch.setattr("convnext_kernels.backends.cpu.layernorm.forward", broken)
    heard = []
    report = ck.tune(net(), image(), on_result=heard.append)
    (failed,) = [t for t in heard if t.error]
    assert (failed.op, failed.backend, failed.median) == ("layernorm", "cpu", None)
    assert failed.error == "RuntimeError: out of registers"
    assert [(row.op, row.backend) for row in report.rows] == [("block", "cpu"), ("layernorm", "eager")]
    assert report.remarks() == ["does not run: layernorm 1x8x6x6 float32 forward cpu: RuntimeError: out of registers"]


@needs_cpu
def test_the_minutes_end(clock, monkeypatch):
    """What was found until then is kept, and the report says what was not timed."""
    now, times = [0.0], module._times
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def slow(functions, device):
        now[0] += 40
        return times(functions, device)

    monkeypatch.setattr(module, "_times", slow)
    report = ck.tune(net(), image(), minutes=1)
    assert [row.op for row in report.rows] == ["block"]  # the schedules, then the backends
    assert report.remarks() == ["not timed: layernorm 1x8x6x6 float32 forward"]
    assert cache.size() == 2


@needs_cpu
def test_the_model_is_as_before(clock):
    model = nn.Sequential(ck.FusedConvNeXtBlock(8, drop_path=0.5), ck.FusedConvNeXtBlock(8), nn.BatchNorm2d(8)).train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, state = image(4), torch.get_rng_state()
    report = ck.tune(model, x, training=True)
    counts = {(row.phase, row.count) for row in report.rows}  # a choice serves blocks with and without drop path
    assert counts == {("forward", 2), ("backward", 1)}, "dx is needed in one of the two backward passes"
    assert [m.training for m in (model, *model)] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@needs_cpu
@pytest.mark.parametrize(
    ("forward", "memory", "variant"),
    [("eager", "min", "v1"), ("cpu", "balanced", "v1"), ("cpu", "min", "v2"), ("eager", "balanced", "v2")],
)
def test_forward_and_backward_passes_are_chosen_apart(forward, memory, variant):
    """What is kept does not depend on the choice: a graph that was compiled before relies on it."""
    case = Case("both backends", n=2, c=12, h=5, w=6, variant=variant)
    dy, _, reference = expected_gradients("block", case, torch.float32)

    def choice(kernel, problem, candidates, where):
        other = "cpu" if forward == "eager" else "eager"
        name = {"block": forward, "block backward": other}.get(kernel)
        return next((c for c in candidates if c.name == name), None)

    def call(**arguments):
        return OPERATORS["block"].call(**arguments, memory=memory)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = OPERATORS["block"].arguments(case, torch.float32)
    gradients(compiled, arguments, dy)
    with tuning.forced(choice):
        found = gradients(compiled, arguments, dy)
    torch.testing.assert_close({k: v.double() for k, v in found.items()}, reference, rtol=1e-4, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case("tiles", n=3, c=24, h=21, w=17),
        Case("GRN of small images", n=5, c=24, h=7, w=9, variant="v2"),
        Case("GRN of a divided image", n=1, c=8, h=40, w=33, variant="v2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_schedules_of_the_cpu_kernel_give_the_same_bits(case, dtype):
    """And the kernel obeys them: without GRN threads wait for each other in "columns" only."""
    from convnext_kernels.backends.cpu.mlp_native import PHASES, SCHEDULES, timed_phases

    torch.set_num_threads(3)
    arguments = OPERATORS["block"].arguments(case, dtype)
    results, waited = [], []
    for schedule in SCHEDULES:
        with tuning.forced(lambda *_, schedule=schedule: schedule), timed_phases() as seconds:
            results.append(OPERATORS["block"].call(**arguments, backend="cpu"))
        waited += [schedule.name] if seconds[:, PHASES.index("waiting")].sum() > 0 else []
    assert_as_good_as_eager(results[0], *expected("block", case, dtype))
    assert all(torch.equal(result, results[0]) for result in results)
    assert waited == (["columns"] if case.variant == "v1" else [s.name for s in SCHEDULES])


def test_wrong_arguments(tmp_path):
    model, x = net(), image()
    (tmp_path / "file").touch()
    for arguments, options, error, words in (
        ((print, x), {}, TypeError, r"model: expected a torch\.nn\.Module, got builtin"),
        ((model, [x]), {}, TypeError, "example: expected a tensor, got list"),
        ((model, x.to("meta")), {}, ValueError, "example: is on meta, expected .*: cpu"),
        ((nn.Conv2d(8, 8, 1), x), {}, ValueError, r"model: it makes no call .* after accelerate\(\)"),
        ((model, x), {"minutes": 0}, ValueError, "minutes: expected a number above 0, got 0"),
        ((model, x), {"write": tmp_path / "file" / "a.json"}, OSError, "write: .*cannot be written"),
    ):
        with pytest.raises(error, match=words):
            ck.tune(*arguments, **options)


@needs_cpu
def test_with_the_real_clock(file):
    """Every candidate of a small model, forward and backward."""
    report = ck.tune(net(), image().requires_grad_(), training=True, minutes=5)
    wanted = itertools.product(("block", "layernorm"), ("forward", "backward"), ("cpu", "eager"))
    assert {(t.op, t.phase, t.backend) for t in report.timings} == {*wanted}
    assert all(0 < t.minimum <= t.median for t in report.timings)
    assert all(row.best <= row.eager for row in report.rows)
    assert json.loads(file.read_text())["entries"] == report.choices
