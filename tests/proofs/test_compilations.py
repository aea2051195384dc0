"""A network at many image and batch sizes compiles each Triton kernel a few times, not once for every size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4", reason="counts compilations of Triton kernels")
pytest.importorskip("torchvision", reason="the network is torchvision's")
ROOT = Path(__file__).resolve().parents[2]


def test_few_compilations():
    # In a process of its own: here kernels may run in the interpreter, which compiles nothing.
    command = [sys.executable, str(ROOT / "proofs/compilations.py"), "--quick", "--check"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[2:])
    for kernel in (
        "layernorm_fwd_kernel",
        "mlp_fused_fwd_kernel",
        "mlp_expand_kernel",
        "rolling_kernel",
        "rows_kernel",
    ):
        assert 1 <= int(counts[kernel]) <= 12
