import json

import pytest

import convnext_kernels as ck
from convnext_kernels.bench import checks, results


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(checks, "SHAPES", ((1, 8, 5, 3),))
    monkeypatch.setattr(checks, "WIDE", ())
    found, missing = checks.backends("cpu")
    few = [context for context in found if context[0] in ("eager", "cpu portable")]  # tests/bench runs them all
    monkeypatch.setattr(checks, "backends", lambda device: (few, missing))


def test_without_a_gpu_it_says_what_could_not_run(run, tmp_path, monkeypatch):
    from convnext_kernels import environment

    monkeypatch.setattr(environment, "gpus", lambda: ([], "no driver"))
    result = run("verify", "--no-bench", "--report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "not run: no kernel was run on a GPU: no driver" in result.stdout
    words = " ".join(result.stdout.split())
    for name, status in ck.list_backends().items():
        assert status.available or f"not run: backend {name}: {status.reason}" in words
    assert "numerical checks passed on cpu" in result.stdout
    found = results.load(tmp_path / "results.json")
    assert found.complete
    assert len(found.checks) > 50
    assert found.not_run[0] == "no kernel was run on a GPU: no driver"
    html = (tmp_path / "report.html").read_text()
    assert "no kernel was run on a GPU: no driver" in html
    assert "downsample" in html


def test_json(run, tmp_path):
    result = run("verify", "--no-bench", "--report", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout == (tmp_path / "results.json").read_text()
    assert {check["status"] for check in json.loads(result.stdout)["checks"]} <= {"ok", "unavailable"}
    assert "numerical checks passed on cpu" in result.stderr


def test_a_broken_kernel_fails(run, tmp_path, monkeypatch):
    forward = ck.FusedConvNeXtBlock.forward
    monkeypatch.setattr(ck.FusedConvNeXtBlock, "forward", lambda self, x: forward(self, x) * 1.1)
    result = run("verify", "--no-bench", "--report", tmp_path)
    assert result.exit_code == 1
    assert "numerical checks failed" in result.stderr
    assert "block 1x8x5x3 V1 fp32 on eager: wrong" in result.stdout
    assert "wrong" in (tmp_path / "report.html").read_text()


def test_the_benchmark_follows(run, tmp_path, monkeypatch):
    from convnext_kernels.bench.cases import select
    from convnext_kernels.cli import verify

    monkeypatch.setattr(verify, "select", lambda mode, only, device: select(mode, ("dwconv/*fp32*",), device))
    result = run("verify", "--quick", "--report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "dwconv, forward" in result.stdout
    found = results.load(tmp_path / "results.json")
    assert found.complete
    assert found.checks
    assert found.records
