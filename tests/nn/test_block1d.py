"""Blocks and convolutions over time."""

from functools import partial

import pytest
import torch
from torch import nn

from convnext_kernels import FusedConvNeXtBlock1d, functional
from convnext_kernels.nn import DepthwiseConv1d
from tests.tolerance import randomize_


@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_inference_and_sequences(channels_last):
    """Values and gradients on every backend: tests/ops/test_parts.py."""
    block = randomize_(FusedConvNeXtBlock1d(12, channels_last=channels_last))
    x = torch.randn((2, 17, 12) if channels_last else (2, 12, 17))
    y = block(x)
    assert y.stride() == x.stride()
    with torch.no_grad():
        assert torch.equal(block(x), y)
        assert torch.equal(nn.Sequential(block, block)(x), block(block(x)))


def test_what_is_wrong_is_named():
    block, x = FusedConvNeXtBlock1d, torch.zeros(2, 8, 5)
    adaptive, conv = block(8, adanorm_num_embeddings=4), partial(functional.depthwise_conv1d, x)
    for call, kind, words in (
        (lambda: block(8, kernel_size=(1, 7)), TypeError, "kernel_size: expected an integer"),
        (lambda: block(8, adanorm_num_embeddings=2, norm="rms"), ValueError, "norm: expected 'layer'"),
        (lambda: block(8)(x[:, :, None]), ValueError, r"3 dimensions \(N, C, L\), got 4"),
        (lambda: block(8)(x.mT), ValueError, r"x: expected 8 channels, as dwconv_weight .* have, got \(2, 5, 8\)"),
        (lambda: block(8, channels_last=True)(torch.zeros(5)), ValueError, r"\(N, L, C\), got 1"),
        (lambda: block(8)(x, torch.tensor(0)), TypeError, "cond_embedding_id: expec"),
        (lambda: adaptive(x, torch.tensor([0, 1])), ValueError, "one integer or shape"),
        (lambda: adaptive(x, torch.tensor([[0], [4]])), IndexError, "expected 0 to 3, got 4"),
        (lambda: conv(torch.zeros(8, 1, 1, 3)), ValueError, r"weight: expected shape \(8, 1, K\)"),
        (lambda: DepthwiseConv1d(8, 3, stride=3), ValueError, "stride: expected 1 or 2, got 3"),
    ):
        with pytest.raises(kind, match=words):
            call()


def test_exporters_see_operators_of_pytorch():
    block = randomize_(FusedConvNeXtBlock1d(8, use_grn=True, channels_last=True)).eval()
    x = torch.randn(2, 13, 8)
    program = torch.export.export(block, (x,), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)
    traced = torch.fx.symbolic_trace(nn.Sequential(block, DepthwiseConv1d(13, 3)))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
