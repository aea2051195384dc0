"""What a training loop does around forward and backward, a gradient scaler, `torch.func` and second derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from convnext_kernels import FusedConvNeXtBlock
from tests.operators import OPERATORS, differentiable
from tests.shapes import TRITON, Case, chosen
from tests.tolerance import randomize_
from tests.training.pairs import MODELS, loss_of, pair, pictures

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@chosen(lambda backend: backend != TRITON)
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


CASE = Case("small", c=6, h=4, w=3, k=3, ratio=2)


@chosen(lambda op, backend: backend != TRITON or op == "layernorm")
@pytest.mark.parametrize("op", OPERATORS)
def test_func_on_every_op(op, backend):
    """grad, vjp, jacrev against autograd; vmap over x, over all tensors and of gradients against a loop."""
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
    alone = grad(lambda *v: run(*v).square().sum(), argnums=everything)
    each = vmap(alone, in_dims=(1, *[None] * (len(values) - 1)))(xs.movedim(0, 1), *values[1:])
    one_by_one = [alone(x, *values[1:]) for x in xs]
    torch.testing.assert_close(each, tuple(map(torch.stack, zip(*one_by_one, strict=True))))
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


STEPS = 4


def _train(model, average, accumulate, clip):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        for part in range(accumulate):
            loss = loss_of(model, pictures(seed=step * accumulate + part)) / accumulate
            loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), clip, error_if_nonfinite=True)
        optimizer.step()
        average.update_parameters(model)
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_loss_curve(name):
    """With accumulated and clipped gradients, and an average of the weights."""
    plain, ours = pair(name)
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for model in (plain, ours)]
    expected, found = (_train(model, average, 3, 0.1) for model, average in zip((plain, ours), averages, strict=True))
    assert found == pytest.approx(expected, rel=2e-3)
    with torch.no_grad():
        torch.testing.assert_close(*(a.module.eval()(pictures(seed=9)[0]) for a in averages), rtol=1e-3, atol=1e-3)
    assert expected[-1] != pytest.approx(expected[0], rel=2e-3), "nothing was learned that could differ"


@chosen(lambda backend: backend != TRITON)
@pytest.mark.parametrize("memory", ["min", "balanced"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_activation_checkpointing(use_grn, reentrant, memory, backend):
    """With drop path: the second forward pass draws the same samples."""
    block = FusedConvNeXtBlock(8, 0.5, use_grn=use_grn, kernel_size=3, memory=memory, backend=backend)
    randomize_(block).train()
    kept = copy.deepcopy(block)
    x = torch.randn(8, 8, 5, 4, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    torch.manual_seed(7)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    torch.manual_seed(7)
    kept(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for (name, p), q in zip(block.named_parameters(), kept.parameters(), strict=True):
        scale = q.grad.abs().max().item()
        torch.testing.assert_close({name: p.grad}, {name: q.grad}, rtol=0, atol=1e-5 * scale)
