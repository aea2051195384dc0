"""The tables of mutants follow the code, and the runner tells how tests ended."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "proofs"))
    return importlib.import_module("mutations")


@pytest.mark.parametrize("subject", ["cuda", "cpu", "triton", "python"])
def test_every_change_fits_the_code(mutations, subject):
    mutants = mutations.table(subject)
    assert len({(mutant.file, mutant.name) for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, f"{mutant.file}: {mutant.name}"
        assert mutant.new != mutant.old
        assert mutant.proof in mutations.PROOFS
        assert (ROOT / mutant.tests[0]).exists()


def test_every_file_of_kernels_is_there(mutations):
    files = {mutant.file for subject in mutations.SUBJECTS for mutant in mutations.table(subject)}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").rglob("*.cu")}
    sources |= {f"csrc/cpu/{op}.cpp" for op in ("dwconv", "dwconv_wgrad", "layernorm", "grn", "mlp", "mlp_backward")}
    sources |= {f"csrc/cpu/{op}.cpp" for op in ("downsample", "downsample_backward")}
    sources |= {
        f"convnext_kernels/backends/triton/{path.name}"
        for path in (ROOT / "convnext_kernels" / "backends" / "triton").glob("*.py")
        if "@triton.jit" in path.read_text(encoding="utf-8")
    }
    assert sources <= files


@pytest.mark.parametrize(
    ("code", "output", "caught"),
    [
        (0, "3 passed in 1.0s", ""),
        (1, "FAILED tests/ops/test_parity.py::test_forward[grn-cpu] - Assert", "failed: test_forward[grn-cpu]"),
        (1, "RuntimeError: deadlock in kernel", "deadlock"),
        (-11, "", "crash: SIGSEGV"),
        (99, "==1==ERROR: AddressSanitizer: heap-buffer-overflow on", "sanitizer: heap-buffer-overflow"),
    ],
)
def test_how_tests_ended(mutations, code, output, caught):
    assert mutations.noticed(code, output, ("tests",)) == caught


@pytest.mark.parametrize(("code", "output"), [(0, "3 skipped in 1.0s"), (5, "no tests ran"), (2, "1 error")])
def test_runs_that_say_nothing(mutations, code, output):
    with pytest.raises(mutations.Broken, match="pytest tests"):
        mutations.noticed(code, output, ("tests",))
