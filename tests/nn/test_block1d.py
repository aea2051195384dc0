"""Blocks and convolutions over time."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from convnext_kernels import FusedConvNeXtBlock1d, functional
from convnext_kernels.nn import DepthwiseConv1d
from tests.interop.test_speech import ConvNeXtBlock, ConvNeXtV2Block
from tests.shapes import TRITON, chosen
from tests.tolerance import assert_as_good_as_eager, randomize_


@chosen(lambda dtype, backend: dtype == torch.float32 or backend != TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("original", "options"),
    [
        (ConvNeXtBlock(12, 24), {"mlp_ratio": 2}),
        (ConvNeXtBlock(12, 48, count=4), {"adanorm_num_embeddings": 4}),
        (ConvNeXtV2Block(12, 48, dilation=2), {"use_grn": True, "dilation": 2, "channels_last": True}),
    ],
    ids=["vocos", "vocos with AdaLayerNorm", "f5"],
)
def test_loads_the_weights_of(original, options, dtype, backend):
    original = randomize_(original).to(dtype)
    block = FusedConvNeXtBlock1d(12, **options, dtype=dtype, backend=backend)
    block.load_state_dict(original.state_dict())
    shape = (2, 17, 12) if "channels_last" in options else (2, 12, 17)
    x = torch.randn(shape, dtype=dtype)
    condition = (torch.tensor([[2], [0]]),) if "adanorm_num_embeddings" in options else ()
    reference = copy.deepcopy(original).double()(x.double(), *condition)
    y = block(x, *condition)
    assert_as_good_as_eager(y.detach(), original(x, *condition).detach(), reference.detach())
    assert y.stride() == x.stride()
    if condition:
        return
    with torch.no_grad():
        assert torch.equal(block(x), y)
        assert torch.equal(nn.Sequential(block, block)(x), block(block(x)))


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_conv1d(stride, backend):
    ours = randomize_(DepthwiseConv1d(6, 5, stride=stride, dilation=3, backend=backend))
    theirs = nn.Conv1d(6, 6, 5, stride, padding=6, dilation=3, groups=6)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 21)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_another_norm_and_activation(backend):
    block = randomize_(FusedConvNeXtBlock1d(12, norm="rms", activation="relu", backend=backend))
    x = torch.randn(2, 12, 17)
    y = block.dwconv(x).mT
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
    y = block.gamma * block.pwconv2(block.pwconv1(y).relu())
    torch.testing.assert_close(block(x), x + y.mT)


def test_what_is_wrong_is_named():
    adaptive = FusedConvNeXtBlock1d(8, adanorm_num_embeddings=4)
    conv = partial(functional.depthwise_conv1d, torch.zeros(2, 8, 5))
    for call, kind, words in (
        (lambda: FusedConvNeXtBlock1d(8, channels_last=1), TypeError, "channels_last: expected a bool, got 1"),
        (lambda: FusedConvNeXtBlock1d(8, kernel_size=(1, 7)), TypeError, "kernel_size: expected an integer"),
        (lambda: FusedConvNeXtBlock1d(8, activation="elu"), ValueError, "activation: expected one of .*, got 'elu'"),
        (lambda: FusedConvNeXtBlock1d(8, adanorm_num_embeddings=2, norm="rms"), ValueError, "norm: expected 'layer'"),
        (lambda: FusedConvNeXtBlock1d(8, kernel_size=4), ValueError, "expected an odd kernel size from 1 to 51, got 4"),
        (lambda: FusedConvNeXtBlock1d(8)(torch.zeros(2, 8, 1, 5)), ValueError, r"3 dimensions \(N, C, L\), got 4"),
        (lambda: FusedConvNeXtBlock1d(8)(None), TypeError, "x: expected a tensor, got NoneType"),
        (
            lambda: FusedConvNeXtBlock1d(8)(torch.zeros(2, 5, 8)),
            ValueError,
            r"dwconv_weight: expected shape \(5, 1, K\)",
        ),
        (lambda: FusedConvNeXtBlock1d(8, channels_last=True)(torch.zeros(5)), ValueError, r"\(N, L, C\), got 1"),
        (lambda: FusedConvNeXtBlock1d(8)(torch.zeros(2, 8, 0)), ValueError, "x: C and L must be at least 1"),
        (lambda: FusedConvNeXtBlock1d(8)(torch.zeros(2, 8, 5), torch.tensor(0)), TypeError, "cond_embedding_id: expec"),
        (
            lambda: adaptive(torch.zeros(2, 8, 5)),
            TypeError,
            "expected a tensor of integers, got None",
        ),
        (lambda: adaptive(torch.zeros(2, 8, 5), torch.tensor([0, 1])), ValueError, "one integer or shape"),
        (lambda: adaptive(torch.zeros(2, 8, 5), torch.tensor([[0], [4]])), IndexError, "expected 0 to 3, got 4"),
        (
            lambda: conv(torch.zeros(8, 1, 1, 3)),
            ValueError,
            r"weight: expected shape \(8, 1, K\) .* got \(8, 1, 1, 3\)",
        ),
        (lambda: conv(torch.zeros(8, 1, 6)), ValueError, "weight: expected an odd kernel size from 1 to 51, got 6"),
        (lambda: conv(None), TypeError, "weight: expected a tensor, got NoneType"),
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
