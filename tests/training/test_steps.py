"""What a training loop does around forward and backward, on models of other libraries against the same accelerated."""

import copy
import io
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from convnext_kernels import FusedConvNeXtBlock
from tests.shapes import TRITON, chosen
from tests.tolerance import randomize_
from tests.training.pairs import MODELS, assert_same_gradients, gradients, loss_of, pair, pictures

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
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip": 0.1}], ids=["plain", "accumulation", "clipping"])
def test_loss_curve(name, options):
    plain, ours = pair(name)
    expected = _train(plain, **options)
    assert _train(ours, **options) == pytest.approx(expected, rel=2e-3)
    assert expected[-1] != pytest.approx(expected[0], rel=2e-3), "nothing was learned that could differ"


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    _, ours = pair(name)
    whole = copy.deepcopy(ours)
    x, y = pictures(batch=6)
    for part in range(3):
        (loss_of(ours, (x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2])) / 3).backward()
    loss_of(whole, (x, y)).backward()
    assert_same_gradients(ours, whole)


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


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_a_model(name):
    _, ours = pair(name, drop_path=0.3)
    kept = copy.deepcopy(ours)
    for model, wrapped in ((ours, True), (kept, False)):
        torch.manual_seed(3)
        x, y = pictures()
        logits = checkpoint(model, x, use_reentrant=False) if wrapped else model(x)
        nn.functional.cross_entropy(logits, y).backward()
    assert_same_gradients(ours, kept, 1e-6)


@pytest.mark.parametrize("frozen", ["weights", "blocks", "all but the head"])
@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters(name, frozen):
    plain, ours = pair(name)
    for model in (plain, ours):
        for key, p in model.named_parameters():
            matrix = p.dim() > 1 and "head" not in key and "classifier" not in key
            head = key.startswith(("head.fc", "classifier.2"))
            p.requires_grad_(
                {
                    "weights": not matrix,
                    "blocks": not key.startswith(("stages.0", "features.1")),
                    "all but the head": head,
                }[frozen]
            )
        loss_of(model, pictures()).backward()
    assert 0 < len(gradients(ours)) < len(list(ours.parameters()))
    assert_same_gradients(ours, plain)


def test_frozen_blocks_compute_no_gradient():
    """Not even their backward op runs where nothing behind them wants a gradient."""
    _, ours = pair("timm V1")
    for key, p in ours.named_parameters():
        p.requires_grad_(key.startswith("head.fc"))
    loss = loss_of(ours, pictures())
    called = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        loss.backward()
    assert called
    assert not [name for name in called if name.startswith("convnext_kernels::")]


@pytest.mark.parametrize("name", MODELS)
def test_ema_copies(name):
    plain, ours = pair(name)
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


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _saved}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies_in_the_middle_of_training(name, copied):
    _, ours = pair(name)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    _train(ours, 2, optimizer=optimizer)
    twin = COPIES[copied](ours)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    for model in (ours, twin):
        model.zero_grad()
        loss_of(model, pictures(seed=5)).backward()
    assert_same_gradients(twin, ours, 0)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    _train(ours, 1, optimizer=optimizer)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} is shared"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_formats_of_the_model(name, memory_format):
    plain, ours = pair(name)
    x, y = pictures()
    for model in (plain, ours):
        model.to(memory_format=memory_format)
        loss_of(model, (x.contiguous(memory_format=memory_format), y)).backward()
    assert_same_gradients(ours, plain)


LAYOUTS = {
    "permuted": lambda g: g.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "expanded": lambda g: g[:, :1, :1, :1].expand_as(g),
    "strided": lambda g: torch.stack([g, g], dim=-1)[..., 0],
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice": lambda g: torch.cat([g, g])[: len(g)],
    "offset": lambda g: torch.cat([g.flatten(), g.flatten()])[1 : 1 + g.numel()].view(g.shape),
}


def everyday(layout, use_grn, memory_format, backend):
    """Where more than the op sees the gradient; what the op makes of it is in tests/ops/test_layouts.py."""
    turn = [*LAYOUTS].index(layout) + use_grn
    return backend[0] == "cpu" and (memory_format == torch.channels_last) == turn % 2


@chosen(everyday)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_of_the_incoming_gradient(layout, use_grn, memory_format, backend):
    block = randomize_(FusedConvNeXtBlock(8, use_grn=use_grn, kernel_size=3, backend=backend))
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    dy = LAYOUTS[layout](torch.randn(2, 8, 5, 5))
    block(x).backward(dy)
    odd, dx = {k: g.clone() for k, g in gradients(block).items()}, x.grad.clone()
    x.grad = None
    block.zero_grad()
    block(x).backward(dy.contiguous(memory_format=memory_format))
    torch.testing.assert_close(dx, x.grad, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients(block).items():
        torch.testing.assert_close(odd[key], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
