"""`inline_kernels`: what AOTInductor sees of our ops. proofs/aoti_cuda.py compiles it."""

import json

import pytest

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")
pytestmark = pytest.mark.extended

# Triton for a GPU that is not there, with tensors on the CPU in place of it.
SCRIPT = """
import json
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import convnext_kernels as ck
from convnext_kernels.backends.triton.ahead import TargetDriver

driver.set_active(TargetDriver(GPUTarget("cuda", 90, 32), "cpu"))
torch.set_grad_enabled(False)
half = torch.bfloat16


def export(module, dtype=half, **options):
    module = module.to(dtype).eval()
    with ck.keep_ops():
        return torch.export.export(module, (torch.randn(2, 64, 8, 8, dtype=dtype),), **options)


def nodes(program):
    names = []
    for node in program.run_decompositions({}).graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            names.append(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__)
        elif "convnext_kernels" in str(node.target):
            names.append(str(node.target))
    return names


def error(program):
    try:
        nodes(program)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


block = ck.FusedConvNeXtBlock(64)
programs = {
    "V1": export(block),
    "V2": export(ck.FusedConvNeXtBlock(64, use_grn=True)),
}
found = {"kept": nodes(programs["V1"])}
with ck.inline_kernels():
    found |= {name: nodes(program) for name, program in programs.items()}
    found["dynamic"] = error(export(block, dynamic_shapes=({0: torch.export.Dim("n")},)))
    found["fp64"] = error(export(ck.FusedConvNeXtBlock(64), torch.float64))
found["kept again"] = nodes(programs["V1"])
print(json.dumps(found))
"""


def test_ops_become_launches(run_python):
    found = json.loads(run_python(SCRIPT).splitlines()[-1])
    assert [found[name] for name in ("V1", "V2")] == [
        ["rows_kernel", "mlp_fused_fwd_kernel"],
        ["rows_kernel", "mlp_expand_kernel", "grn_response_kernel", "mlp_project_kernel"],
    ]
    assert found["kept"] == found["kept again"] == ["convnext_kernels.block.default"], "elsewhere they stay ops"
    assert found["dynamic"].startswith("ValueError: inline_kernels: convnext_kernels::block got a tensor of size (s")
    assert "export without dynamic_shapes" in found["dynamic"]
    assert found["fp64"].startswith("BackendError: no backend can serve block: triton: dtype torch.float64")
