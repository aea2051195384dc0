"""What is special about depthwise convolutions: wide images in 16 bits, transposed volumes."""

import pytest
import torch
from torch.library import opcheck

from convnext_kernels import functional
from tests.operators import OPERATORS, gradients
from tests.shapes import TRITON, chosen


@chosen(lambda dtype, backend: dtype == torch.bfloat16 or backend != TRITON)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "dilation"), [(7, 2), (3, 3), (7, 1)])
def test_gradients_of_wide_channels_last_images(k, dilation, dtype, backend):
    """More than 28 columns: there oneDNN's 16-bit weight gradient is garbage for dilations above 1 (torch 2.14.1)."""
    x, dy = (torch.randn(1, 17, 8, 31).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(17, 1, k, k).to(dtype).to(memory_format=torch.channels_last)
    operator = OPERATORS["dwconv"]
    found = gradients(lambda **a: operator.serve(backend, dilation=dilation, **a), {"x": x, "weight": weight}, dy)
    wide = {"x": x.double().contiguous(), "weight": weight.double().clone(memory_format=torch.contiguous_format)}
    expected = gradients(lambda **a: operator.reference(dilation=dilation, **a), wide, dy.double().contiguous())
    for name, truth in expected.items():
        error = (found[name].double() - truth).abs().max() / truth.abs().max()
        assert error <= 8 * torch.finfo(dtype).eps, name  # garbage is off by more than its own size


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
