"""`torch.autocast`: dtypes as eager's block has them, parameters and their gradients stay fp32."""

import pytest
import torch

from convnext_kernels import list_backends
from tests.operators import OPERATORS, differentiable, op_calls, to, with_gradients
from tests.shapes import KERNELS, TRITON, Case, chosen
from tests.tolerance import assert_as_good_as_eager

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
    compare(op, arguments, kernel)


def compare(op, arguments, backend, **options):
    """Result and gradients under autocast with those of fp64, as near as eager's."""
    operator = OPERATORS[op]
    wide = with_gradients(to(arguments, torch.double))
    reference = operator.reference(**wide)
    arguments, eager_arguments = with_gradients(arguments), with_gradients(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.serve(backend, **arguments, **options)
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


@pytest.mark.parametrize("memory", ["min", "balanced"])
@pytest.mark.parametrize(("first", "second"), [("triton", "eager"), ("triton", "cuda"), ("cuda", "eager")])
def test_another_backend_takes_what_was_kept(first, second, memory):
    """A timed choice may take one backend for the forward pass and another one for the gradient."""
    for name in (first, second):
        if not list_backends()[name].available:
            pytest.skip(list_backends()[name].reason)
    small = Case("small: launched many times in the interpreter", c=16, h=4, w=5, k=3, ratio=2)
    arguments = with_gradients(OPERATORS["block"].arguments(small, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = OPERATORS["block"].serve(first, **arguments, memory=memory)
    ((_, (*given, saved, needs, _), _),) = op_calls(lambda: y.backward(torch.randn_like(y)))
    assert given[1].dtype == torch.bfloat16, "x is kept in the dtype of the matmuls"
    assert {t.dtype for t in saved} == {torch.bfloat16}
    backward = torch.ops.convnext_kernels.block_backward
    ours, others = (backward(*given, saved, needs, name) for name in (first, second))
    for gradient, other in zip(ours, others, strict=True):
        assert gradient.dtype == other.dtype == torch.float32
        assert gradient.stride() == other.stride()
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradient, other, rtol=0, atol=0.02 * scale)
    with pytest.raises(TypeError, match=r"saved\[0\]: expected bfloat16, got float32"):
        backward(*given, [saved[0].float(), *saved[1:]], needs, second)
    with pytest.raises(TypeError, match="dout: expected float32, got bfloat16"):
        backward(given[0].bfloat16(), *given[1:], saved, needs, second)


@pytest.mark.parametrize("op", OPERATORS)
def test_dtypes(op):
    """Convolutions and products run in bf16; LayerNorm and GRN in fp32, as `torch.nn.functional.layer_norm` on CUDA."""
    arguments = with_gradients(OPERATORS[op].arguments(CASES["v1"], torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = OPERATORS[op].call(**arguments)
    expected = torch.bfloat16 if op in ("dwconv", "dwconv3d", "downsample") else torch.float32
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
