"""`import convnext_kernels` is light, and works without the compiled extension."""

import json
from importlib.util import find_spec

import torch

HEAVY = ("triton", "torchvision", "timm", "transformers", "matplotlib", "sklearn", "skimage", "rich", "click", "jinja2")


def test_import_and_a_call(run_python):
    """The import changes no setting of torch; a call brings in nothing heavy."""
    same, reason, added = run_python("""
import json, random, sys, torch
def state():
    return (
        torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.get_rng_state().tolist(), random.getstate(),
    )
before, modules = state(), set(sys.modules)
import convnext_kernels
print(before == state())
convnext_kernels.FusedConvNeXtBlock(4)(torch.randn(1, 4, 3, 3)).sum().backward()
print(convnext_kernels.list_backends()["triton"].reason)
print(json.dumps(sorted({m.split(".")[0] for m in set(sys.modules) - modules})))
""").splitlines()
    assert same == "True"
    assert torch.cuda.is_available() or not find_spec("triton") or "PyTorch finds no usable GPU" in reason
    assert not set(json.loads(added)) & set(HEAVY)
