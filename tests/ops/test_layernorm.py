"""LayerNorm where the mean is far larger than the deviation, alone and inside the fused ops."""

import pytest
import torch

from tests.operators import OPERATORS, check_forward, check_gradients
from tests.shapes import DTYPES, KERNELS, Case, chosen

CASE = Case("mean 100 times the deviation", n=2, c=96, h=5, w=7)


@chosen(lambda dtype, sign, kernel: sign == (-1) ** (DTYPES.index(dtype) + KERNELS.index(kernel)))
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["layernorm", "mlp", "block", "downsample"])
def test_large_mean(op, dtype, sign, kernel):
    """One-pass variance in fp32, E[y^2] - E[y]^2, loses four digits here."""
    arguments = OPERATORS[op].arguments(CASE, dtype)
    if op == "block":  # what the LayerNorm sees is the convolution's output
        arguments["dwconv_bias"] = arguments["dwconv_bias"] + 100 * sign
    else:
        arguments["x"] = arguments["x"] + 100 * sign
    check_forward(op, arguments, kernel)


@pytest.mark.parametrize("value", [3.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_pixels(dtype, value, kernel):
    """Variance 0: eps alone decides, and the result is the bias, also where the mean of C equal values rounds."""
    arguments = OPERATORS["layernorm"].arguments(CASE, dtype)
    arguments["x"] = torch.full_like(arguments["x"], value)
    y = OPERATORS["layernorm"].serve(kernel, **arguments)
    assert torch.equal(y, arguments["bias"].view(1, -1, 1, 1).expand_as(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_channels_than_registers_hold(dtype, backend):
    """Above 8192 a GPU walks over a pixel's channels, here five blocks of them, the last one not full."""
    arguments = OPERATORS["layernorm"].arguments(Case("no whole number of blocks", n=1, c=8200, h=1, w=3), dtype)
    arguments["x"] = arguments["x"] + 3  # else what a mask leaves out is near zero anyway
    check_forward("layernorm", arguments, backend)
    check_gradients("layernorm", arguments, torch.randn_like(arguments["x"]), backend)
