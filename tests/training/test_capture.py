"""What CUDA graph capture asks of a training step, as far as it shows without a GPU (nothing was captured on one).

Capture forbids reading a value of the GPU on the host, synchronising, and other streams than the current one; and a
graph replays the launches it saw, so these may depend on shapes alone.
"""

import re
from pathlib import Path

import pytest
import torch

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.backends.cuda import native
from tests.tolerance import randomize_

ROOT = Path(__file__).resolve().parents[2]
# Operators that copy a value, or a number of values, to the host.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal", "repeat_interleave")


def _operators(function):
    """Names of all operators that `function` runs, those inside our ops too, which dispatch modes do not see."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.name for event in profile.events()}


def _reads(operators):
    return sorted(name for name in operators if name.removeprefix("aten::") in READS)


def _step(block, x):
    y = block(x)
    y.backward(torch.ones_like(y))


def _block(use_grn, memory, backend, drop_path=0.0):
    block = FusedConvNeXtBlock(16, drop_path, use_grn=use_grn, kernel_size=3, memory=memory, backend=backend)
    return randomize_(block).train()


@pytest.mark.parametrize("memory", ["min", "balanced"])
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_value_is_read_on_the_host(name, use_grn, memory, backend):
    if backend != name:
        pytest.skip("the backends of GPUs")
    block = _block(use_grn, memory, backend, drop_path=0.5)
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    _step(block, x)  # the first step compiles and packs
    operators = _operators(lambda: _step(block, x))
    assert {"convnext_kernels::block", "convnext_kernels::block_backward", "aten::empty"} <= operators
    assert not _reads(operators)


def test_reads_inside_an_op_would_be_seen():
    with torch.library._scoped_library("convnext_kernels_tests", "DEF") as library:
        library.define("reads(Tensor x) -> Tensor")
        library.impl("reads", lambda x: x * x.sum().item(), "CompositeExplicitAutograd")
        assert _reads(_operators(lambda: torch.ops.convnext_kernels_tests.reads(torch.ones(3)))) == [
            "aten::_local_scalar_dense"
        ]


@pytest.mark.skipif(not native.on_host(), reason="the recorder stands in for a GPU where there is none")
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_launches_depend_on_shapes_alone(use_grn):
    """Two steps on the same buffers with other values: the same kernels, grids and parameters but for addresses."""
    block = _block(use_grn, "balanced", "cuda")
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    steps = []
    for value in (1.0, -3.0, torch.nan):
        launches = []
        native.extension().set_device()
        native.extension().set_recorder(lambda *what, to=launches: to.append(what[:4]))
        try:
            with torch.no_grad():
                x.fill_(value)
            _step(block, x)
        finally:
            native.extension().set_recorder(None)
        steps.append(launches)
    assert len(steps[0]) > 4
    assert steps[0] == steps[1] == steps[2]


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
