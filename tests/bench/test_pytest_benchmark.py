import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_kernels.bench.results import EAGER, OURS

pytest.importorskip("pytest_benchmark")
BREAK_BF16 = """
import convnext_kernels as ck

forward = ck.LayerNorm2d.forward
ck.LayerNorm2d.forward = lambda self, x: forward(self, x) * (1.1 if x.element_size() == 2 else 1)
"""


def test_its_options_count_and_wrong_numbers_fail(tmp_path):
    (tmp_path / "broken.py").write_text(BREAK_BF16)
    file = tmp_path / "times.json"
    options = ("--benchmark-only", "--benchmark-min-rounds=7", "--benchmark-max-time=0", f"--benchmark-json={file}")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-k", "layernorm and not compile", *options]
    command += ["-p", "broken", "-o", f"pythonpath={tmp_path}", "-p", "no:cacheprovider"]
    # A worker of pytest-xdist times nothing, and neither does what inherits its environment.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=clean, capture_output=True, text=True)
    assert done.stdout, done.stderr
    summary = done.stdout.splitlines()[-1]
    assert "1 failed, 5 passed" in summary, done.stdout + done.stderr
    assert "error" not in summary, done.stdout
    assert "AssertionError: output: " in done.stdout
    found = {}
    for bench in json.loads(file.read_text())["benchmarks"]:
        assert bench["stats"]["rounds"] == 7
        found.setdefault(bench["group"], set()).add(bench["extra_info"]["candidate"])
    one, other = found.values()
    assert other < one == {EAGER, OURS, "eager, contiguous"}
