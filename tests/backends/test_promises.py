"""What each backend has promised to serve, asserted: the parity tests skip where a backend refuses."""

import pytest
import torch

from convnext_kernels import BackendError, dispatch
from convnext_kernels.spec import OPS, OpSpec
from tests.operators import OPERATORS
from tests.shapes import DTYPES, cases

PROMISED = {"eager": (*DTYPES, torch.float64), "cpu": DTYPES, "triton": DTYPES, "cuda": DTYPES}


def test_every_backend_has_made_a_promise():
    assert set(dispatch.list_backends()) <= set(PROMISED)


@pytest.mark.parametrize("op", OPERATORS)
def test_serves_the_whole_table(op, backend):
    if backend == "triton":  # the parity tests run the table, once is long enough; here: that none of them is a skip
        for dtype in DTYPES:
            spec = OpSpec(
                op, "cuda" if torch.cuda.is_available() else "cpu", dtype, dtype, 17, (31, 31), (3, 3), 1, 68, True
            )
            assert dispatch.choose(spec, backend).__name__ == f"convnext_kernels.backends.triton.{op}"
        return
    for dtype in PROMISED[backend]:
        for case in cases(op):
            y = OPERATORS[op].call(**OPERATORS[op].arguments(case, dtype), backend=backend)
            assert y.dtype == dtype


@pytest.mark.parametrize("op", OPERATORS)
def test_refusal_of_fp64_says_why(op, backend):
    if torch.float64 in PROMISED[backend]:
        pytest.skip(f"{backend} serves fp64")
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
