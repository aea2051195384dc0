"""Autocast with a gradient scaler, `torch.func` and second derivatives, on models in training."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.interop.block import BlockAdapter
from tests.interop.helpers import fused_calls
from tests.operators import OPERATORS, differentiable
from tests.shapes import TRITON, Case, chosen
from tests.tolerance import randomize_
from tests.training.pairs import pair, pictures

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@chosen(lambda use_grn, backend: use_grn or backend != TRITON)
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_a_gradient_scaler_sees_what_is_not_finite(use_grn, backend):
    block = randomize_(FusedConvNeXtBlock(8, use_grn=use_grn, kernel_size=3, backend=backend)).train()
    optimizer, scaler = torch.optim.SGD(block.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=256.0)
    for value, scale in ((1, 256), (torch.inf, 128)):
        x = torch.randn(2, 8, 5, 4).half()
        x[0, 0, 0, 0] = value
        before = block.pwconv1.weight.clone()
        with torch.autocast("cpu", torch.float16):
            scaler.scale(block(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(block.pwconv1.weight, before) == (scale == 128)
        assert scaler.get_scale() == scale
        optimizer.zero_grad()


# PyTorch's own: a rule for vmap that torchvision's plain model would want.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_func_grad_and_per_sample_gradients():
    plain, ours = pair("torchvision")
    x, y = pictures()

    def loss(model, parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    results = []
    for model in (plain, ours):
        model.eval()
        parameters = {k: p.detach() for k, p in model.named_parameters()}
        one = grad(lambda p, m=model: nn.functional.cross_entropy(functional_call(m, p, (x,)), y))(parameters)
        each = vmap(grad(lambda p, x, y, m=model: loss(m, p, x, y)), in_dims=(None, 0, 0))(parameters, x, y)
        results.append((one, each))
    (plain_one, plain_each), (ours_one, ours_each) = results
    calls = fused_calls(lambda: vmap(lambda x: ours(x[None]))(x))
    blocks = sum(isinstance(m, BlockAdapter) for m in ours.modules())
    assert calls["block"] == len(x) * blocks, "the fused ops were not what was compared"
    for key, each in plain_each.items():
        atol = 1e-4 * each.abs().max().item()
        torch.testing.assert_close(ours_each[key], each, rtol=1e-3, atol=atol)
        for one in (plain_one[key], ours_each[key].mean(0)):
            torch.testing.assert_close(ours_one[key], one, rtol=1e-3, atol=atol)


CASE = Case("small", c=6, h=4, w=3, k=3, ratio=2)


@chosen(lambda op, backend: backend != TRITON or op == "layernorm")
@pytest.mark.parametrize("op", OPERATORS)
def test_func_on_every_op(op, backend):
    """grad, vjp, jacrev against autograd; vmap over x and over all tensors against a loop."""
    operator = OPERATORS[op]
    arguments = operator.arguments(CASE, torch.float32)
    names = differentiable(arguments)
    values = [arguments[n] for n in names]

    def run(*values):
        return operator.serve(backend, **{**arguments, **dict(zip(names, values, strict=True))})

    leaves = [v.clone().requires_grad_() for v in values]
    y = run(*leaves)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy)
    out, pull = vjp(run, *values)
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(pull(dy), expected)
    everything = tuple(range(len(values)))
    torch.testing.assert_close(grad(lambda *v: (run(*v) * dy).sum(), argnums=everything)(*values), expected)
    jacobian = jacrev(lambda x: (run(x, *values[1:]) * dy).flatten(1).sum(1))(values[0])
    torch.testing.assert_close(jacobian.sum(0), expected[0])
    xs = torch.stack([values[0], 2 * values[0], -values[0]])
    batched = vmap(lambda x: run(x, *values[1:]), in_dims=1)(xs.movedim(0, 1))
    torch.testing.assert_close(batched, torch.stack([run(x, *values[1:]) for x in xs]))
    both = vmap(run)(*[torch.stack([v, 0.5 * v]) for v in values])
    torch.testing.assert_close(both, torch.stack([run(*values), run(*[0.5 * v for v in values])]))


# PyTorch's forward mode compiles decompositions with what it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("op", OPERATORS)
def test_forward_mode_says_that_it_is_not_there(op):
    """It must not give zeros."""
    arguments = OPERATORS[op].arguments(CASE, torch.float32)
    x = arguments["x"]
    message = rf"convnext_kernels::{op} has no forward-mode derivative; use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        jvp(lambda x: OPERATORS[op].call(**{**arguments, "x": x}), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        OPERATORS[op].call(**{**arguments, "x": torch.autograd.forward_ad.make_dual(x, x)})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_second_derivatives_by_func_are_left_to_the_original_operators():
    plain, ours = pair("timm-v2")
    x = pictures(2)[0]
    results = []
    for model in (plain, ours):
        model.eval()
        results.append(grad(lambda x, m=model: grad(lambda x: m(x).square().sum())(x).square().sum())(x))
        results.append(jvp(lambda x, m=model: grad(lambda x: m(x).square().sum())(x), (x,), (x,))[1])
    for expected, actual in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(actual, expected)
