"""What each backend has promised to serve, asserted: the parity tests skip where a backend refuses."""

import itertools

import pytest
import torch

from convnext_kernels import BackendError, dispatch
from convnext_kernels.spec import OPS, OpSpec
from tests.operators import OPERATORS
from tests.shapes import DTYPES, cases

PROMISED = {"eager": (*DTYPES, torch.float64), "cpu": DTYPES, "triton": DTYPES, "cuda": DTYPES}


@pytest.mark.parametrize("op", OPERATORS)
def test_serves_the_whole_table(op, backend):
    """None of the parity tests is a skip. Both directions; nothing is computed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (op, backend) == ("dwconv3d", "cuda"):
        with pytest.raises(BackendError, match="cuda: there is no CUDA kernel for volumes"):
            OPERATORS[op].call(**OPERATORS[op].arguments(cases(op)[0], torch.float32), backend=backend)
        return
    for dtype, case, backward in itertools.product(PROMISED[backend], cases(op), (False, True)):
        sides = {"dwconv": case.k, "block": case.k, "downsample": case.patch, "dwconv3d": case.k}.get(op, 0)
        kernel = sides if isinstance(sides, tuple) else (sides,) * (3 if op == "dwconv3d" else 2)
        dilation = case.dilation if isinstance(case.dilation, tuple) else (case.dilation,) * 2
        hidden = {"downsample": case.c + 3, "mlp": case.ratio * case.c, "block": case.ratio * case.c}.get(op, 0)
        of_block = (hidden, case.variant == "v2", backward, case.norm, case.activation)
        spec = OpSpec(op, device, dtype, dtype, case.c, kernel, dilation, case.stride, *of_block)
        assert dispatch.choose(spec, backend).__name__ == f"convnext_kernels.backends.{backend}.{op}", case


@pytest.mark.parametrize("op", OPERATORS)
def test_refusal_of_fp64_says_why(op, backend):
    if torch.float64 in PROMISED[backend] or (op, backend) == ("dwconv3d", "cuda"):
        pytest.skip(f"{backend} serves fp64, or nothing of this op")
    arguments = OPERATORS[op].arguments(cases(op)[0], torch.float64)
    with pytest.raises(BackendError, match=rf"no backend can serve {op}: {backend}: .*float64"):
        OPERATORS[op].call(**arguments, backend=backend)


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["mlp", "block", "downsample"])
def test_serves_autocast(op, compute_dtype, backend):
    spec = OpSpec(op, "cpu", torch.float32, compute_dtype, 96, (7, 7), (1, 1), 1, 384)
    assert dispatch.choose(spec, backend).__name__ == f"convnext_kernels.backends.{backend}.{op}"


@pytest.mark.parametrize("op", OPS)
def test_auto_prefers_native_kernels_on_the_cpu(op):
    if not dispatch.list_backends()["cpu"].available:
        pytest.skip(dispatch.list_backends()["cpu"].reason)
    for dtype in DTYPES:
        spec = OpSpec(op, "cpu", dtype, dtype, 96, (7, 7), (1, 1), 1, 384)
        assert dispatch.choose(spec).__name__ == f"convnext_kernels.backends.cpu.{op}"
    assert dispatch.choose(OpSpec(op, "cuda", dtype, dtype, 96, (7, 7), (1, 1), 1, 384)).__name__.endswith(
        f".eager.{op}"
    )
