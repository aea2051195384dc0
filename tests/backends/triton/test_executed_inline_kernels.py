"""Programs for AOTInductor, whose ops are launches (`inline_kernels`), compute what a call computes."""

import pytest
import torch

import convnext_kernels as ck
from tests.tolerance import randomize_


@pytest.mark.parametrize("use_grn", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_a_call(architecture, dtype, use_grn):
    block = randomize_(ck.FusedConvNeXtBlock(32, use_grn=use_grn)).to(dtype).eval()
    x = torch.randn(2, 32, 7, 5).to(dtype)
    with torch.no_grad():
        with ck.keep_ops():
            program = torch.export.export(block, (x,))
        with ck.inline_kernels():
            program = program.run_decompositions({})
        assert not any("convnext_kernels" in str(node.target) for node in program.graph.nodes)
        with ck.use_backend("triton"):
            assert torch.equal(program.module()(x), block(x))
