"""benchmarks/cpu_sweep.py and cpu_phases.py: what they cover, what they measure, and that wrong results are noticed."""

import itertools

import pytest
import torch
from click.testing import CliRunner

from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.mlp_native import PHASES, timed_phases
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.nn import DepthwiseConv2d, FusedConvNeXtBlock

pytestmark = pytest.mark.skipif(native.import_error() is not None, reason="the CPU kernels are not built")


@pytest.fixture
def sweep(program):
    return program("cpu_sweep")


def test_every_other_shape_is_a_usual_one_but_for_one_number(sweep):
    found = list(itertools.islice(sweep.shapes(3), 400))
    usual = [{"n": 1, "c": c, "h": size, "w": size, "k": 7} for c, size in STAGES]
    for shape in found[::2]:
        values = {name: getattr(shape, name) for name in usual[0]}
        assert min(sum(values[name] != u[name] for name in values) for u in usual) <= 1
    assert all(1 <= s.h <= 96 and 1 <= s.w <= 96 and s.n in (1, 2, 8) for s in found)
    assert len(set(found)) > 300
    assert found == list(itertools.islice(sweep.shapes(3), len(found)))


def test_no_speed_of_wrong_numbers(sweep, monkeypatch):
    forward = DepthwiseConv2d.forward
    monkeypatch.setattr(DepthwiseConv2d, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(AssertionError, match=r"dwconv 1x8x5x5 K3: differs from eager"):
        sweep.measure(sweep.Shape("dwconv", 1, 8, 5, 5, 3), torch.float32, 1)


def test_sweep_prints_the_worst(sweep):
    result = CliRunner().invoke(sweep.main, ["--shapes", "3", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "3 shapes, median" in result.output
    assert "\nworst: " in result.output


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_phases_of_a_block(use_grn):
    block = FusedConvNeXtBlock(32, use_grn=use_grn, backend="cpu")
    x = torch.randn(1, 32, 40, 40)
    with torch.no_grad():
        plain = block(x)
        with timed_phases() as seconds:
            assert torch.equal(block(x), plain)
        measured = seconds.clone()
        block(x)
    assert seconds.shape == (torch.get_num_threads(), len(PHASES))
    total = dict(zip(PHASES, measured.sum(0).tolist(), strict=True))
    assert all(total[name] > 0 for name in ("dwconv", "LayerNorm", "W1, GELU", "W2, residual"))
    assert (total["GRN"] > 0) == use_grn
    assert torch.equal(seconds, measured), "calls outside were timed too"


def test_phases_with_more_threads_than_there_were():
    block = FusedConvNeXtBlock(32, backend="cpu")
    x = torch.randn(1, 32, 40, 40)
    torch.set_num_threads(1)
    with torch.no_grad(), timed_phases() as seconds:
        torch.set_num_threads(4)
        block(x)
    assert seconds.shape[0] == 1
    assert (seconds[0] > 0).any()


def test_phases_prints_a_row_for_each_block(program, monkeypatch):
    phases = program("cpu_phases")
    monkeypatch.setattr(phases, "CALLS", 2)
    monkeypatch.setattr(phases, "STAGES", ((32, 6), (64, 3)))
    result = CliRunner().invoke(phases.main, ["--threads", "1", "--batch", "1"])
    assert result.exit_code == 0, result.output
    for label in ("V1 C32 6x6 b1 fp32", "V2 C64 3x3 b1 bf16", "ceilings"):
        assert label in result.output
