"""What differs between versions of PyTorch and Triton stays in one place, and works in this version."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import convnext_kernels
from convnext_kernels.torch_versions import exact_mm

PACKAGE = Path(convnext_kernels.__file__).parent
# Names of PyTorch and Triton that may change without notice, and the files that use them.
PRIVATE = re.compile(r"\b(torch\._(?!_version__)\w+|torch\.utils\._\w+|forward_ad\._\w+|triton\.(?:knobs|runtime)\b)")
USERS = {
    "torch_versions.py": ("torch", "forward_ad"),
    "bench/candidates.py": ("torch._inductor",),  # `freezing` must be set while Dynamo traces
    "backends/triton/ahead.py": ("triton",),
    "backends/triton/device.py": ("triton",),
    "backends/triton/interpreter.py": ("triton",),
    "backends/triton/launch.py": ("triton",),
}


def private_names(source: str) -> set[str]:
    code = re.sub(r'""".*?"""|"[^"\n]*"|#[^\n]*', "", source, flags=re.DOTALL)
    return set(PRIVATE.findall(code))


def test_private_names_are_in_one_place():
    for path in PACKAGE.rglob("*.py"):
        allowed = USERS.get(path.relative_to(PACKAGE).as_posix(), ())
        wrong = {name for name in private_names(path.read_text()) if not name.startswith(allowed)}
        assert not wrong, f"{path.relative_to(PACKAGE)}: {', '.join(sorted(wrong))}"


TF32 = """
import torch
import convnext_kernels as ck
from convnext_kernels.torch_versions import tf32_allowed

matmul = torch.backends.cuda.matmul
found = [tf32_allowed()]
for allowed in (True, False):
    matmul.allow_tf32 = allowed
    found.append(tf32_allowed())
new = hasattr(matmul, "fp32_precision")
for precision in ("tf32", "ieee", "tf32") if new else ():
    matmul.fp32_precision = precision
    found.append(tf32_allowed())
if ck.list_backends()["triton"].available:
    block = ck.FusedConvNeXtBlock(8, backend="triton")  # its plan depends on TF32
    with torch.no_grad():
        block(torch.randn(1, 8, 3, 3))
print(found == [False, True, False, *((True, False, True) if new else ())])
"""


def test_tf32_is_seen_by_either_name(run_python):
    """Since PyTorch 2.9 reading `allow_tf32` raises an error once `fp32_precision` was set."""
    assert run_python(TF32, TRITON_INTERPRET="1").strip() == "True"


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_sum_in_fp32_and_settings_stay(dtype, allowed, monkeypatch, request):
    matmul, seen = torch.backends.cuda.matmul, []
    name = f"allow_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_reduced_precision_reduction"

    def state():
        return getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)

    was = getattr(matmul, name)
    request.addfinalizer(lambda: setattr(matmul, name, was))
    setattr(matmul, name, allowed)
    before, matrix = state(), SimpleNamespace(is_cuda=True, dtype=dtype)
    with pytest.raises(TypeError):  # an error leaves them too
        exact_mm(matrix, matrix)
    assert state() == before
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(state()))
    exact_mm(matrix, matrix)
    assert seen == [(False, before[1])]
    assert state() == before
