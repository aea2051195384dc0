"""Weight gradients by cuBLAS: sums in fp32, and the user's settings afterwards as before."""

from types import SimpleNamespace

import pytest
import torch

from convnext_kernels.torch_versions import exact_mm


@pytest.fixture
def settings():
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in names}
    yield matmul
    for name, value in before.items():
        setattr(matmul, name, value)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_exact_and_settings_stay(dtype, allowed, settings, monkeypatch):
    name = f"allow_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_reduced_precision_reduction"

    def state():
        return getattr(settings, name), getattr(settings, f"{name}_split_k", None)

    setattr(settings, name, allowed)
    before, seen = state(), []
    matrix = SimpleNamespace(is_cuda=True, dtype=dtype)
    with pytest.raises(TypeError):  # an error leaves them too
        exact_mm(matrix, matrix)
    assert state() == before
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(state()))
    exact_mm(matrix, matrix)
    assert seen == [(False, before[1])]
    assert state() == before
