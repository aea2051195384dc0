"""Triton's kernels for AMD's GPUs: a case compiles; `proofs/triton_rocm.py` has all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.amd", reason="this Triton has no backend for AMD")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", ["mlp C96 56x56 N8 fp16 forward"])
def test_compiles(case, tmp_path):
    """fp16 is what has an inline instruction for NVIDIA."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "proofs/triton_rocm.py", "--only", case]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in ("gfx942", "gfx90a"):
        assert f"{arch}: 1 cases" in done.stdout
