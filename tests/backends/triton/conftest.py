"""The architectures that compiled kernels are executed for, where an emulator of PTX is on the path."""

import pytest

from convnext_kernels import tuning


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


@pytest.fixture
def plan_of():
    """Force the bottleneck's plan: ``with plan_of("fused"):``; of "gemm" all products are ours."""

    def force(plan: str):
        def choice(kernel, problem, candidates, gpu):
            if kernel in ("mlp_forward", "mlp_backward"):
                return next((c for c in candidates if c.config["plan"] == plan), None)
            return candidates[0] if kernel.startswith("mlp_") else None

        return tuning.forced(choice)

    return force
