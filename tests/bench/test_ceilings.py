import math

import pytest

from convnext_kernels.backends.cpu import native
from convnext_kernels.bench import ceilings
from convnext_kernels.bench.ceilings import Work

needs_extension = pytest.mark.skipif(native.import_error() is not None, reason="the compiled extension is missing")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.005)
    monkeypatch.setattr(ceilings, "SIDE", 64)


def check(found):
    assert {"fp32", "bf16", "vector"} <= set(found["flops"])
    assert set(found["sources"]) == {*found["flops"], "memory"}
    rates = [*found["flops"].values(), *(level["rate"] for level in found["memory"])]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    sizes = [level["size"] for level in found["memory"]]
    assert sizes[-1] is None
    assert sizes[:-1] == sorted(sizes[:-1])


@needs_extension
@pytest.mark.usefixtures("short")
def test_measured_by_the_probe():
    found = ceilings.measure("cpu")
    check(found)
    assert found["sources"]["vector"] == "fp32 multiply-adds in registers"


@pytest.mark.usefixtures("short")
def test_measured_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "import_error", lambda: "not built")
    found = ceilings.measure("cpu")
    check(found)
    assert "extension is missing" in found["sources"]["memory"]


CEILINGS = {
    "flops": {"bf16": 4e12, "vector": 1e12},
    "memory": [{"level": "L2", "size": 1000, "rate": 1e12}, {"level": "memory", "size": None, "rate": 1e10}],
}


def test_shares():
    work = Work(flops=5 * 10**9, depthwise_flops=10**9, x=100, others=100, parameters=50)
    compute, memory = ceilings.shares(work, 2, "bf16", 4e-3, CEILINGS)
    assert compute == pytest.approx((1e-3 + 1e-3) / 4e-3)
    assert memory == pytest.approx(500 / 1e12 / 4e-3)
    assert ceilings.shares(work, 8, "bf16", 4e-3, CEILINGS)[1] == pytest.approx(2000 / 1e10 / 4e-3)


def test_an_unknown_ceiling_gives_no_share():
    work = Work(10, 0, 1, 1, 1)
    assert ceilings.shares(work, 4, "fp16", 1.0, CEILINGS)[0] is None
    assert ceilings.shares(work, 4, "bf16", 1.0, {}) == (None, None)
    assert ceilings.shares(Work(0, 0, 1, 1, 1), 4, "bf16", 1.0, CEILINGS)[0] is None  # LayerNorm
