"""Consecutive blocks in one call: the bits of the blocks' own calls, and these calls where something needs them."""

import copy

import pytest
import timm
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.nn import FusedSequential, sequential
from tests.interop.helpers import fused_calls
from tests.tolerance import randomize_

OPTIONS = {
    "v1": {},
    "v2": {"use_grn": True},
    "kernel 13, dilation 2": {"kernel_size": 13, "dilation": 2},
    "SimpleNorm, SiLU": {"norm": "simple", "activation": "silu"},
}
AVAILABLE = [name for name, status in ck.list_backends().items() if status.available and name != "eager"]
ROWS = [
    ("v1", torch.float32, 2),
    ("v2", torch.float32, 2),
    ("v1", torch.bfloat16, 3),
    ("kernel 13, dilation 2", torch.float32, 1),
    ("SimpleNorm, SiLU", torch.bfloat16, 2),
]
# Triton's interpreter takes seconds a call; its prepared calls are those of the CUDA backend.
CASES = [(backend, *row) for backend in AVAILABLE for row in (ROWS[1:2] if backend == "triton" else ROWS)]


def stage(count=3, **options):
    return randomize_(FusedSequential(*(FusedConvNeXtBlock(12, **options) for _ in range(count)))).eval()


def one_by_one(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.fixture(params=[name for name in AVAILABLE if name != "triton"])
def backend(request):
    return request.param


@pytest.fixture
def x():
    return torch.randn(2, 12, 5, 4)


@pytest.mark.parametrize(("backend", "options", "dtype", "count"), CASES)
def test_one_call(backend, options, dtype, count):
    blocks = stage(count, backend=backend, **OPTIONS[options]).to(dtype)
    with torch.no_grad():
        for memory_format in (torch.channels_last, torch.contiguous_format)[: 1 if backend == "triton" else 2]:
            x = torch.randn(2, 12, 5, 4).to(dtype=dtype, memory_format=memory_format)
            expected = one_by_one(blocks, x)
            for _ in range(2):  # prepared, then replayed
                result = sequential.run(blocks, x)
                assert result is not None
                assert result.stride() == x.stride()
                assert torch.equal(result, expected)
            assert torch.equal(blocks(x), expected)


def _wrap(blocks):
    forward = blocks[1].forward
    blocks[1].forward = lambda x: forward(x) + 1


def _replace(blocks):
    blocks[1] = randomize_(FusedConvNeXtBlock(12, backend=blocks[0].backend)).eval()


CHANGES = {
    "assign": lambda blocks: setattr(blocks[1].norm, "bias", nn.Parameter(torch.randn(12))),
    "write data": lambda blocks: blocks[2].gamma.data.mul_(2),
    "eps": lambda blocks: setattr(blocks[1].norm, "eps", 0.5),
    "replace": _replace,
    "append": lambda blocks: blocks.append(nn.Hardswish()),
    "wrap": _wrap,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, x, backend):
    blocks = stage(backend=backend)
    with torch.no_grad():
        before = blocks(x)
        change(blocks)
        changed = blocks(x)
        assert torch.equal(changed, one_by_one(blocks, x))
        assert torch.equal(blocks(x), changed)
        assert not torch.equal(changed, before)


def test_training_draws_and_gives_gradients(x, backend):
    blocks = stage(backend=backend, drop_path=0.5)
    with torch.no_grad():
        plain = blocks(x)
        blocks.train()
        torch.manual_seed(0)
        dropped = blocks(x)
        assert not torch.equal(dropped, plain)
        torch.manual_seed(0)
        assert torch.equal(one_by_one(blocks, x), dropped)
    assert blocks.eval()(x).requires_grad
    with torch.no_grad():
        assert torch.equal(blocks(x), plain)


@pytest.mark.parametrize("inner", ["", ".pwconv1"], ids=["block", "inner module"])
def test_hooks_are_called(inner):
    model = ck.accelerate(timm.create_model("convnext_atto", num_classes=0)).eval()
    blocks = model.stages[0].blocks
    x = torch.randn(1, 40, 8, 8)
    with torch.no_grad():
        before = blocks(x)
        assert sequential.run(blocks, x) is not None
        seen = []
        handle = blocks.get_submodule("1.mlp.fc1" if inner else "1").register_forward_hook(lambda *a: seen.append(a))
        blocks(x)
        assert len(seen) == 1
        handle.remove()
        with nn.modules.module.register_module_forward_hook(lambda *a: seen.append(a)):
            blocks(x)
        assert len(seen) > 1
        assert torch.equal(blocks(x), before)


def test_the_requested_backend_is_taken(x):
    blocks = stage()
    with torch.no_grad():
        blocks(x)
        with ck.use_backend("eager"):
            assert sequential.run(blocks, x) is None  # no single call of several blocks
            assert torch.equal(blocks(x), one_by_one(blocks, x))
        blocks[1].backend = "eager"
        assert sequential.run(blocks, x) is None
        assert torch.equal(blocks(x), one_by_one(blocks, x))


def test_modes_see_the_blocks(x):
    blocks = stage()
    with torch.no_grad():
        blocks(x)
        assert fused_calls(lambda: blocks(x)) == {"block": 3}
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(blocks(x), one_by_one(blocks, x))
        assert torch.equal(torch.func.vmap(blocks)(x[None])[0], blocks(x))
    with pytest.raises(ValueError, match=r"x: expected 12 channels, as dwconv_weight"), torch.no_grad():
        blocks(torch.randn(2, 11, 5, 4))
    with pytest.raises(TypeError, match=r"x: "), torch.no_grad():
        blocks(torch.randint(3, (2, 12, 5, 4)))


def test_copies_and_parts(x):
    model = ck.accelerate(nn.Sequential(*(ck.nn.FusedConvNeXtBlock(12) for _ in range(3)))).eval()
    with torch.no_grad():
        expected = model(x)
        assert sequential.run(model, x) is not None
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(model[1:](model[0](x)), expected)
    assert type(ck.restore(model)) is nn.Sequential
