"""`torch.autocast`: dtypes as eager's block has them, parameters and their gradients stay fp32."""

import pytest
import torch

from tests.operators import OPERATORS, differentiable, to, with_gradients
from tests.reference import Block
from tests.shapes import KERNELS, TRITON, Case, chosen
from tests.tolerance import assert_as_good_as_eager, randomize_

CASES = {
    "v1": Case("V1", n=3, c=24, h=8, w=6, k=5),
    "v2": Case("V2", n=3, c=24, h=8, w=6, k=5, variant="v2"),
    "plain": Case("neither", n=3, c=24, h=8, w=6, k=5, variant="plain"),
    "drop": Case("drop path", n=3, c=24, h=8, w=6, k=5, drop=True),
}


def everyday(op, case, x_dtype, kernel):
    """Two dtypes of x that alternate; Triton's block runs what its mlp runs."""
    turn = (op == "block") + [*CASES].index(case) + KERNELS.index(kernel)
    return x_dtype == (torch.float32, torch.bfloat16)[turn % 2] and (op == "mlp" or kernel != TRITON)


@chosen(everyday)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", ["mlp", "block"])
def test_bottleneck(op, case, x_dtype, kernel):
    operator = OPERATORS[op]
    arguments = operator.arguments(CASES[case], torch.float32)
    for name in ("x", "residual"):
        if name in arguments:
            arguments[name] = arguments[name].to(x_dtype)
    wide = with_gradients(to(arguments, torch.double))
    reference = operator.reference(**wide)
    arguments, eager_arguments = with_gradients(arguments), with_gradients(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.serve(kernel, **arguments)
        eager = operator.reference(**eager_arguments)
    assert_as_good_as_eager(y, eager, reference, what=op, dtype=torch.bfloat16)
    dy = torch.randn(y.shape, dtype=torch.double)
    y.backward(dy.to(y.dtype))
    eager.backward(dy.to(eager.dtype))
    reference.backward(dy)
    for name in differentiable(arguments):
        ours, eagers, true = (a[name].grad for a in (arguments, eager_arguments, wide))
        assert ours.dtype == arguments[name].dtype == eagers.dtype
        what = f"{op}: gradient of {name}"
        assert_as_good_as_eager(ours, eagers, true, what=what, dtype=torch.bfloat16, scale=1.0)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_module_like_the_official_block(use_grn, x_dtype):
    from convnext_kernels import FusedConvNeXtBlock

    official = randomize_(Block(8, use_grn=use_grn))
    fused = FusedConvNeXtBlock(8, use_grn=use_grn)
    fused.load_state_dict(official.state_dict())
    x = torch.randn(2, 8, 7, 7, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == official(x).dtype


@pytest.mark.parametrize("op", OPERATORS)
def test_dtypes(op):
    """Convolutions and products run in bf16; LayerNorm and GRN in fp32, as `torch.nn.functional.layer_norm` on CUDA."""
    arguments = with_gradients(OPERATORS[op].arguments(CASES["v1"], torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = OPERATORS[op].call(**arguments)
    expected = torch.bfloat16 if op in ("dwconv", "downsample") else torch.float32
    assert y.dtype == expected
    y.sum().backward()
    for name in differentiable(arguments):
        assert arguments[name].grad.dtype == torch.float32, name


@pytest.mark.parametrize("op", OPERATORS)
def test_fp64_stays(op):
    arguments = OPERATORS[op].arguments(CASES["v1"], torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPERATORS[op].call(**arguments)
    torch.testing.assert_close(y, OPERATORS[op].call(**arguments), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPERATORS)
def test_disabled(op, backend):
    arguments = OPERATORS[op].arguments(CASES["v1"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        y = OPERATORS[op].serve(backend, **arguments)
    torch.testing.assert_close(y, OPERATORS[op].serve(backend, **arguments), rtol=0, atol=0)
