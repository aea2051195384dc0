import re

import pytest

from convnext_kernels.backends import cpu
from convnext_kernels.cli import demo
from tests.pages import Page

SMALL = ("--model", "timm/test_convnext", "--size", "64", "--repeats", "1")


@pytest.fixture(scope="module")
def shipped_run(tmp_path_factory):
    """One run on the shipped photographs in both dtypes: (result, report)."""
    from click.testing import CliRunner

    from convnext_kernels.cli import main

    report = tmp_path_factory.mktemp("report") / "new folder" / "demo.html"
    result = CliRunner().invoke(main, ["demo", *SMALL, "--report", str(report)])
    return result, report


def test_table(shipped_run):
    result, report = shipped_run
    assert result.exit_code == 0, result.output
    assert "fp32" in result.stdout
    assert "bf16" in result.stdout
    speedup = r" +(\d+\.\d+x (faster|slower)|as fast)"
    assert re.search(rf"speed-up over eager \(medians\){speedup}{speedup}", result.stdout)
    assert re.search(r"same top 5 +\d of 8", result.stdout)
    assert "random (seed 0)" in " ".join(result.stdout.split())
    speeds, errors, where = result.stdout.splitlines()[-3:]
    assert re.match(r"Speed: .* (than|as) eager in fp32, .* (than|as) eager in bf16; \d+ modules replaced\.", speeds)
    assert re.match(r"Errors: within the tolerance, \d+% of the allowed error", errors)
    assert where == f"Report: {report}"


def test_report_is_complete_and_self_contained(shipped_run):
    _, report = shipped_run
    page = Page(report)
    assert page.tags.count("img") == 8
    for word in ("china", "hubble deep field", "class ", "ConvNeXtBlock", "replaced"):
        assert word in page.text
    assert "Errors: within the tolerance" in page.text


def test_backends_that_cannot_run(fails, monkeypatch):
    monkeypatch.setenv("CONVNEXT_KERNELS_BACKEND", "nope")
    fails("demo", *SMALL, words=("CONVNEXT_KERNELS_BACKEND", "'nope'"))
    monkeypatch.setenv("CONVNEXT_KERNELS_BACKEND", "cpu")
    monkeypatch.setattr(cpu, "unavailable", lambda: "not compiled")
    fails("demo", *SMALL, words=("cpu", "not compiled"))


def test_wrong_results_fail_and_are_reported(run, tmp_path, monkeypatch):
    """An accelerated model that is off by 1 % must not pass."""
    build = demo.build

    def wrong(model, name, *form):
        model = build(model, name, *form)
        if name == "accelerated":
            model.register_forward_hook(lambda module, inputs, output: output.roll(1, -1) * 1.01)
        return model

    monkeypatch.setattr(demo, "build", wrong)
    report = tmp_path / "r.html"
    result = run("demo", *SMALL, "--dtype", "fp32", "--report", report)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    for word in ("fp32: logits: ", " error ", ", allowed "):
        assert word in line
    assert "not within the tolerance" in Page(report).text
