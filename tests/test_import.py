"""`import convnext_kernels` is light, and works without the compiled extension."""

import json

import pytest

import convnext_kernels as ck

HEAVY = ("triton", "torchvision", "timm", "transformers", "matplotlib", "sklearn", "skimage", "rich", "click", "jinja2")


def test_import_and_a_call(run_python):
    """The import changes no setting of torch; a call brings in nothing heavy."""
    same, added = run_python("""
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
convnext_kernels.list_backends()
print(json.dumps(sorted({m.split(".")[0] for m in set(sys.modules) - modules})))
""").splitlines()
    assert same == "True"
    assert not set(json.loads(added)) & set(HEAVY)


BLOCKED = """
import sys, json
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "convnext_kernels._native":
            raise ImportError("no extension in this test")
sys.meta_path.insert(0, Block())
"""


def test_without_the_compiled_extension(run_python):
    out = run_python(
        BLOCKED
        + """
import torch
import convnext_kernels as ck
status = ck.list_backends()
block = ck.FusedConvNeXtBlock(4, layer_scale_init_value=1.0)
x = torch.randn(2, 4, 5, 5)
y = block(x)
y.sum().backward()
with ck.use_backend("eager"):
    same = torch.equal(block(x), y)
refusal = ""
if "cpu" in status:
    try:
        ck.FusedConvNeXtBlock(4, backend="cpu")(x)
    except ck.BackendError as error:
        refusal = str(error)
print(json.dumps({"status": {n: [s.available, s.reason] for n, s in status.items()}, "same": same, "refusal": refusal}))
"""
    )
    result = json.loads(out)
    assert result["same"], "something other than eager served"
    assert result["status"]["eager"] == [True, ""]
    available, reason = result["status"]["cpu"]
    assert not available
    assert "no extension in this test" in reason
    assert "no extension in this test" in result["refusal"]


def test_old_name_of_list_backends():
    """`backends()` is deprecated; the subpackage of that name is not."""
    with pytest.warns(DeprecationWarning, match=r"^convnext_kernels\.backends\(\) is deprecated, call .*list_backends"):
        table = ck.backends()
    assert table == ck.list_backends()
    import convnext_kernels.backends as package
    from convnext_kernels.backends import get

    assert package is ck.backends
    assert get("eager") is package.eager
