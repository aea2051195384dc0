"""The architectures that compiled kernels are executed for, where an emulator of PTX is on the path."""

from contextlib import nullcontext

import pytest

from tests.backends.triton import interpreted


@pytest.fixture
def emulate(poisoned_memory):
    """``with emulate(90):``: Triton compiles for sm_90; accesses, uninitialised shared memory and races are checked."""
    triton = pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
    emulator = pytest.importorskip("triton_ptxemu", reason="the PTX emulator is not on the path")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels do not become PTX")
    return lambda architecture: emulator.emulated(architecture, check=True)


@pytest.fixture(params=[80, 90], ids=lambda arch: f"sm_{arch}")
def architecture(request, emulate):
    """Two generations of tensor cores: mma.sync and wgmma."""
    with emulate(request.param):
        yield request.param


@pytest.fixture(params=[pytest.param(False, id="interpreted", marks=interpreted), pytest.param(True, id="executed")])
def turn(request):
    """``with turn(index):``: the same test in the interpreter, and as PTX on sm_80 and sm_90 in turn."""
    if request.param:
        emulate = request.getfixturevalue("emulate")
        return lambda index, architectures=(80, 90): emulate(architectures[index % len(architectures)])
    return lambda index, architectures=(): nullcontext()
