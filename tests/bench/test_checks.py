import pytest
import torch

import convnext_kernels as ck
from convnext_kernels.bench import checks
from convnext_kernels.bench.results import OK, WRONG


@pytest.fixture
def small(monkeypatch):
    """Two shapes, every op once."""
    monkeypatch.setattr(checks, "KINDS", list({kind[0]: kind for kind in checks.KINDS}.values()))
    monkeypatch.setattr(checks, "SHAPES", ((1, 8, 5, 3), (3, 17, 2, 4)))
    monkeypatch.setattr(checks, "WIDE", ())


def run(dtypes=("fp32",), names=("eager", "cpu portable")):
    contexts = [context for context in checks.backends("cpu")[0] if names is None or context[0] in names]
    return [c for dtype in dtypes for case in checks.cases("cpu", dtype) for c in checks.check(case, "cpu", contexts)]


@pytest.mark.usefixtures("small")
def test_a_broken_op_is_found(monkeypatch):
    forward = ck.DepthwiseConv2d.forward
    monkeypatch.setattr(ck.DepthwiseConv2d, "forward", lambda self, x: forward(self, x) * 1.001)
    found = run()
    assert {c.status for c in found if c.group == "dwconv"} == {WRONG}
    assert {c.status for c in found if c.group != "dwconv"} == {OK}


@pytest.mark.usefixtures("small")
def test_a_way_that_only_inference_takes_is_checked(monkeypatch):
    forward = ck.LayerNorm2d.forward

    def wrong_in_inference(self, x):
        y = forward(self, x)
        return y if torch.is_grad_enabled() else y + 1

    monkeypatch.setattr(ck.LayerNorm2d, "forward", wrong_in_inference)
    assert {(c.status, c.reason.partition(":")[0]) for c in run() if c.group == "layernorm"} == {(WRONG, "inference")}


@pytest.mark.usefixtures("small")
def test_a_kernel_that_writes_nothing_is_found(monkeypatch):
    """Its output may be memory that holds the right result of another backend."""

    def forward(self, x):
        return torch.empty_like(x) + 0 * sum(p.sum() for p in self.parameters()) * x

    monkeypatch.setattr(ck.LayerNorm2d, "forward", forward)
    found = run()
    assert {c.status for c in found if c.group == "layernorm"} == {WRONG}
    assert all("nan at" in c.reason for c in found if c.group == "layernorm")
