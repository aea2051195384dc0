"""What a training loop does around forward and backward, on models of other libraries against the same accelerated."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from convnext_kernels import FusedConvNeXtBlock
from tests.shapes import TRITON, chosen
from tests.tolerance import randomize_
from tests.training.pairs import MODELS, assert_same_gradients, loss_of, pair, pictures

STEPS = 4


def _train(model, steps=STEPS, accumulate=1, clip=None, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for part in range(accumulate):
            loss = loss_of(model, pictures(seed=step * accumulate + part)) / accumulate
            loss.backward()
        losses.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip, error_if_nonfinite=True)
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_loss_curve(name):
    """With accumulated and clipped gradients."""
    plain, ours = pair(name)
    expected = _train(plain, accumulate=3, clip=0.1)
    assert _train(ours, accumulate=3, clip=0.1) == pytest.approx(expected, rel=2e-3)
    assert expected[-1] != pytest.approx(expected[0], rel=2e-3), "nothing was learned that could differ"


@chosen(lambda memory, reentrant, use_grn, backend: (memory == "min") == reentrant == use_grn or backend != TRITON)
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
    assert_same_gradients(block, kept, 1e-5)
    torch.testing.assert_close(x.grad, other.grad)


def test_ema_copies():
    plain, ours = pair("timm-v2")
    averages = []
    for model in (plain, ours):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        ema = ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(3):
            _train(model, 1, optimizer=optimizer)
            averaged.update_parameters(model)
            ema.update(model, step)
        x, _ = pictures(seed=9)
        with torch.no_grad():
            averages.append((averaged.module.eval()(x), ema.module.eval()(x), model.eval()(x)))
    for ours_out, plain_out in zip(averages[1], averages[0], strict=True):
        torch.testing.assert_close(ours_out, plain_out, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(averages[1][0], averages[1][2], atol=1e-4), "the average is the model itself"
