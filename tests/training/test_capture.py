"""What CUDA graph capture asks of a training step, as far as it shows without a GPU (nothing was captured on one).

Capture forbids reading a value of the GPU on the host, synchronising, and other streams than the current one; and a
graph replays the launches it saw, so these may depend on shapes alone.
"""

import re
from pathlib import Path

import pytest

from convnext_kernels.spec import OPS

ROOT = Path(__file__).resolve().parents[2]
# Operators that copy a value, or a number of values, to the host.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal", "repeat_interleave")


def _reads(operators):
    return sorted(name for name in operators if name.removeprefix("aten::") in READS)


def test_no_source_synchronises_or_allocates():
    """Neither the CUDA sources nor the launchers in Python."""
    forbidden = re.compile(
        r"cuda\w*Synchronize|cudaMalloc|cudaFree|cudaMemcpy|cudaMemset|cudaStreamCreate|synchronize\("
    )
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".h", ".cpp") and "host" not in p.parts]
    folders = [ROOT / "convnext_kernels/backends" / folder for folder in ("gpu", "cuda", "triton")]
    sources += [p for folder in folders for p in folder.glob("*.py")]
    assert len(sources) > 40
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in sources for m in forbidden.finditer(p.read_text())]
    assert not found


LAUNCHES_NOTHING = """
import sys
from dataclasses import replace
import torch, triton
sys.path.insert(0, "proofs")
import host_time
from tests.operators import OPERATORS
from tests.shapes import Case

def forbid(owner, name):
    def called(*_, **__):
        raise AssertionError(f"{name} was called")
    setattr(owner, name, called)

case = Case("a tail in the pixels", n=2, c=32, h=5, w=7, variant="v2")
steps = []
with host_time.driver():
    for name, operator in OPERATORS.items():
        arguments = operator.arguments(replace(case, k=3) if name == "dwconv3d" else case, torch.bfloat16)
        leaves = [a.requires_grad_() for a in arguments.values() if isinstance(a, torch.Tensor)]
        def step(call=operator.call, arguments=arguments, leaves=leaves):
            y = call(**arguments, backend="triton")
            torch.autograd.grad(y, leaves, torch.empty_like(y))
        step()  # compiles and prepares
        steps.append((name, step))
    for owner in (torch.Tensor, torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        for name in ("item", "cpu", "tolist", "numpy", "__array__", "__bool__", "synchronize", "wait_event"):
            if hasattr(owner, name):
                forbid(owner, name)
    def allocate(*_):
        raise AssertionError("a kernel needs memory of its own")
    triton.set_allocator(allocate)
    for name, step in steps:
        before = host_time._Launcher.launches
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        print(name, host_time._Launcher.launches - before, *{event.name for event in profile.events()})
"""


def test_no_op_synchronises_reads_or_allocates_by_itself(run_python):
    """Forward and backward of every op, with launches as on a GPU, on a driver that launches nothing."""
    pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
    printed = [line.split() for line in run_python(LAUNCHES_NOTHING).splitlines()]
    assert {name for name, *_ in printed} == set(OPS)
    for name, launches, *operators in printed:
        assert int(launches) > 1, name
        assert not _reads(operators), name
