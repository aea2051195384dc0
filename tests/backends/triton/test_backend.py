"""Where the Triton backend serves, and what it says where it does not."""

import pytest
import torch

from convnext_kernels.spec import OpSpec


def spec(device="cuda", dtype=torch.bfloat16, compute_dtype=torch.bfloat16):
    return OpSpec("block", device, dtype, compute_dtype, 96, (7, 7), (1, 1), 1, 384)


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
    from convnext_kernels.backends import triton
    from convnext_kernels.backends.triton import device

    monkeypatch.setattr(device, "type_", lambda: "cuda")
    return triton


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"device": "cpu"}, "tensors are on cpu, Triton's kernels run on cuda"),
        ({"dtype": torch.float64}, "float64 is not one of float32, bfloat16, float16"),
        ({"compute_dtype": torch.float64}, "float64 is not one of"),
    ],
)
def test_refuses_with_the_reason(asked, reason, backend):
    assert reason in backend.refuses(spec(**asked))
    assert backend.refuses(spec()) is None
