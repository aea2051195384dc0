import dataclasses
import math

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.bench import measure, workloads
from convnext_kernels.bench.candidates import CANDIDATES
from convnext_kernels.bench.cases import QUICK, Case
from convnext_kernels.bench.ceilings import count
from convnext_kernels.bench.results import EAGER, FAILED, OK, OURS, UNAVAILABLE, WRONG

N, C, SIZE = 2, 16, 7


def case(direction="forward", dtype="fp32"):
    def build():
        return workloads.op("block", N, C, SIZE, SIZE, False)

    return Case("block", "V1 tiny", N, dtype, direction, QUICK, build, C)


def only(*names):
    return tuple(dataclasses.replace(c, wanted=lambda *_: True) for c in CANDIDATES if c.name in names)


@pytest.fixture
def session():
    """Measures with the plain candidates; every candidate does its part once a round."""
    return measure.Session("cpu", QUICK, candidates=only(EAGER, OURS, "eager, contiguous"))


def by_name(records):
    return {record.candidate: record for record in records}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_a_case(session, direction, dtype):
    records = by_name(session.measure(case(direction, dtype)))
    assert list(records) == [EAGER, OURS, "eager, contiguous"]
    workload = workloads.op("block", N, C, SIZE, SIZE, False)
    counts = count(workload.eager, workload.inputs)
    counts = counts.training() if direction == "training" else counts
    for record in records.values():
        assert record.status == OK, record.reason
        assert record.error <= record.allowed_error
        assert len(record.times.rounds) == measure.ROUNDS[QUICK]
        assert record.flops == counts.flops
        assert record.bytes == counts.bytes(4 if dtype == "fp32" else 2)
        assert 0 < record.vector_flops == counts.vector_flops < record.flops
        assert (record.saved_bytes is None) == (direction == "forward")


def broken(monkeypatch, change):
    forward = ck.FusedConvNeXtBlock.forward
    monkeypatch.setattr(ck.FusedConvNeXtBlock, "forward", lambda self, x: change(forward(self, x)))


@pytest.mark.parametrize("change", [lambda y: y * 1.0001, lambda y: y + math.nan, lambda y: y[:1]])
def test_a_broken_kernel_gets_no_speed(session, monkeypatch, change):
    broken(monkeypatch, change)
    records = by_name(session.measure(case()))
    assert records[OURS].status == WRONG
    assert records[OURS].times is None
    assert records[OURS].reason.startswith("output: ")
    assert records[EAGER].status == OK
    assert records[EAGER].times is not None


def test_a_broken_gradient_gets_no_speed(session, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.001

    broken(monkeypatch, Wrong.apply)
    records = by_name(session.measure(case("training")))
    assert records[OURS].status == WRONG
    assert records[OURS].reason.startswith("gradient of ")
    assert by_name(session.measure(case()))[OURS].status == OK  # forward alone is right


def test_a_candidate_that_raises_does_not_cost_the_others(session, monkeypatch):
    def fail(y):
        raise RuntimeError("first line\nsecond line")

    broken(monkeypatch, fail)
    records = by_name(session.measure(case()))
    assert records[OURS].status == FAILED
    assert records[OURS].reason == "RuntimeError: first line second line"
    assert records[EAGER].status == OK


def test_without_a_sound_eager_only_garbage_is_refused(session, monkeypatch):
    convolve = workloads.EagerDwconv.forward

    def garbage(self, x):  # in the dtypes that are timed
        y = convolve(self, x)
        return y if x.dtype == torch.float64 else y + 1e3 * x

    monkeypatch.setattr(workloads.EagerDwconv, "forward", garbage)
    records = by_name(session.measure(case()))
    assert records[EAGER].status == WRONG
    assert records[OURS].status == OK


@pytest.mark.parametrize(("peer", "dtype"), [("OpenVINO", "fp32"), ("OpenVINO", "bf16"), ("ONNX Runtime", "fp32")])
def test_inference_engines_take_part(session, peer, dtype):
    session.candidates = only(EAGER, peer)
    record = by_name(session.measure(case(dtype=dtype)))[peer]
    if record.status == UNAVAILABLE:
        pytest.skip(record.reason)
    assert record.status == OK, record.reason


@pytest.mark.parametrize("kernel", [1, 3, 7, 31])
def test_the_reference_is_a_depthwise_convolution(kernel):
    module = workloads.EagerDwconv(4, kernel)
    x = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    reference = workloads.reference(module)
    assert (type(reference) is not type(module)) == (kernel % 2 == 1)
    torch.testing.assert_close(reference(x), torch.nn.Conv2d.forward(module.double(), x), rtol=1e-12, atol=1e-12)


def test_every_workload_runs_both_ways():
    shape = (1, 8, 6, 5)
    for build in (
        workloads.op("dwconv", *shape, 3, 2),
        workloads.op("block1d", 1, 8, 1, 9, True),
        workloads.op("mednext", 1, 8, 6, 5, 3, 4),
        workloads.op("dwconv3d_transposed", 1, 8, 3, 2, 3, 2),
        workloads.op("layernorm", *shape),
        workloads.op("grn", *shape),
        workloads.op("mlp", *shape, True),
        workloads.op("block", *shape, True, 5),
        workloads.op("downsample", *shape, 2),
    ):
        torch.testing.assert_close(build.ours(*build.inputs), build.eager(*build.inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.extended
def test_compiled_candidates_stay_compiled(session):
    """Building the second must not throw away what was compiled for the first."""
    session.candidates = only(EAGER, "torch.compile", "torch.compile, max-autotune")
    counters = torch._dynamo.utils.counters
    counters.clear()
    records = by_name(session.measure(case()))
    if records["torch.compile"].status == UNAVAILABLE:
        pytest.skip(records["torch.compile"].reason)
    assert {r.status for r in records.values()} == {OK}
    assert counters["stats"]["unique_graphs"] == 2
