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
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(state()))
    matrix = SimpleNamespace(is_cuda=True, dtype=dtype)
    exact_mm(matrix, matrix)
    assert seen == [(False, before[1])]
    assert state() == before


def test_an_error_leaves_the_settings(settings):
    settings.allow_bf16_reduced_precision_reduction = True
    matrix = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    with pytest.raises(TypeError):
        exact_mm(matrix, matrix)
    assert settings.allow_bf16_reduced_precision_reduction
