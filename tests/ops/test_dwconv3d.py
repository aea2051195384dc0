"""What is special about depthwise convolutions of volumes: transposed ones, export, FLOPs."""

import pytest
import torch
from torch.library import opcheck

import convnext_kernels.ops.flops  # noqa: F401  registers the formulas
from convnext_kernels import exporting, functional
from convnext_kernels.nn import DepthwiseConv3d


# opcheck looks at .grad of the copies it makes of x, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_transposed(memory_format):
    """opcheck, finite differences, an empty batch, and what is refused; values: tests/ops/test_parts.py."""
    x = torch.randn(2, 3, 2, 1, 3, dtype=torch.double).contiguous(memory_format=memory_format)
    tensors = [t.requires_grad_() for t in (x, *(torch.randn(s, dtype=torch.double) for s in ((3, 1, 3, 1, 5), (3,))))]
    op, backward = (
        getattr(torch.ops.convnext_kernels, f"dwconv3d_transposed{name}").default for name in ("", "_backward")
    )
    opcheck(op, (*tensors, 1, "auto"))
    y = op(*(t.detach() for t in tensors), 1, "auto")
    opcheck(backward, (torch.randn_like(y), *(t.detach() for t in tensors), 1, [True] * 3, "auto"))
    assert torch.autograd.gradcheck(functional.depthwise_conv_transpose3d, tensors)
    assert functional.depthwise_conv_transpose3d(x[:0], *tensors[1:]).shape == (0, 3, 3, 1, 5)
    with pytest.raises(ValueError, match="output_padding: expected 0 or 1, got 2"):
        functional.depthwise_conv_transpose3d(*tensors, output_padding=2)


@pytest.mark.parametrize("stride", [1, 2])
def test_exported_as_one_operator(stride):
    module = DepthwiseConv3d(6, 5, stride=stride)
    x = torch.randn(2, 6, 4, 5, 6)
    program = torch.export.export(module, (x,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv3d.default"]
    torch.testing.assert_close(program.module()(x), module(x))
    with exporting.keep_ops():
        kept = torch.export.export(module, (x,), strict=False)
    assert "convnext_kernels.dwconv3d.default" in {str(node.target) for node in kept.graph.nodes}
