"""Weights that are cast or folded once per change: every change must be seen; without one nothing may be written."""

import functools
import gc

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from convnext_kernels import FusedConvNeXtBlock
from convnext_kernels.backends.triton import device, weights
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters
from tests.backends.test_stale_weights import data_mul, data_swap, one_element_in_place, one_element_of_data
from tests.backends.triton import forcing
from tests.tolerance import randomize_

STREAM = 0
SHAPE = (132, 66)  # of two programs, the last one with a tail
ROWS = [0, 16, 32]  # the first ones of the programs that fold (40, 24)
NOTHING = MlpParameters(*[None] * len(MlpParameters._fields))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, poisoned_memory):
    if not device.interpreted():
        pytest.skip("needs the interpreter; test_prepared.py runs the same kernel as PTX")
    monkeypatch.setattr(weights, "_entries", {})
    monkeypatch.setattr(weights, "kept", functools.partial(weights.kept, stream=STREAM))


@pytest.fixture
def pair():
    w1, w2 = torch.randn(SHAPE), torch.randn(SHAPE[::-1])
    assert check(w1, w2)
    return w1, w2


def check(w1, w2, dtype=torch.bfloat16):
    """Whether all copies were written, or none: the memory is filled with a number before. They must be right."""
    for entry in weights._entries.values():
        entry.memory[: 2 * w1.numel()].fill_(3e4)
    parameters = NOTHING._replace(pwconv1_weight=w1, pwconv2_weight=w2)
    copies = weights.matrices(MlpCall(w1, None, parameters, None, 1e-6, 1e-6, "layer", "gelu", dtype))
    if all((copy == 3e4).all() for copy in copies):
        return False
    for copy, w in zip(copies, (w1, w2), strict=True):
        assert torch.equal(copy, w.flatten(1).to(dtype))
    return True


def data_add(w):
    """Too little to change most of the rounded values."""
    w.data.add_(1e-6)


def data_of_some(w):
    """As clamp_ does: most lines of the matrix stay as they are."""
    w.data[w > 2.5] = 2.5


CHANGES = [one_element_in_place, data_mul, data_add, data_of_some, data_swap]


@pytest.mark.parametrize("which", [0, 1], ids=["w1", "w2"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes(pair, change, which):
    assert not check(*pair)
    change(pair[which])
    assert check(*pair)
    assert not check(*pair)


def test_other_memory_and_dtypes(pair):
    assert check(*pair, dtype=torch.float16)
    assert not check(*pair)  # both are kept
    assert check(*(w[..., None, None] for w in (pair[0].clone(), pair[1])))  # the weights of 1x1 convolutions
    strided = torch.randn(SHAPE[::-1]).T
    assert check(strided, pair[1])


def test_another_storage_at_the_same_address():
    """With the same values and version: what was kept for a tensor that is gone does not serve another one."""
    memory = bytearray(torch.randn(SHAPE).numpy().tobytes())
    w2 = torch.randn(SHAPE[::-1])
    for _ in range(3):
        w1 = torch.frombuffer(memory, dtype=torch.float32).view(SHAPE)
        assert check(w1, w2)
        assert not check(w1, w2)
        assert len(weights._entries) == 1, "what is kept for a storage goes with it"
        del w1
        gc.collect()  # the interpreter's cycles


def test_another_stream(pair):
    """Copies of one stream are never those of another; only the last ones stay."""
    (kept,) = weights._entries.values()
    begin = 2 * pair[0].numel()
    other = weights.kept(begin + 8, begin, torch.bfloat16, *pair, stream=STREAM + 1)
    assert other.data_ptr() != kept.memory.data_ptr()
    assert [entry.stream for entry in weights._entries.values()] == [STREAM + 1]
    assert check(*pair)


@pytest.mark.parametrize("reason", ["_capturing", "_in_process_group"])
def test_always_written(pair, reason, monkeypatch):
    """Where versions say nothing."""
    monkeypatch.setattr(weights, reason, lambda *_: True)
    for _ in range(2):
        assert check(*pair)


def test_weights_of_inference_mode(pair):
    """They have no versions. What was made in this mode serves outside of it."""
    with torch.inference_mode():
        assert not check(*pair)
        made = [w.clone() for w in pair]
        for _ in range(2):
            assert check(*made)
        fresh = pair[0].clone(), pair[1]
    ordinary = [w.clone() for w in fresh]
    with torch.inference_mode():
        assert check(*ordinary)
    one_element_in_place(ordinary[0])
    assert check(*ordinary)


def fold(p):
    """The first rows of the programs that have written: the memory is filled with a number before."""
    for entry in weights._entries.values():
        entry.memory[: 40 * 24 + 4 * 40].fill_(3e4)
    product, columns = weights.folded(p, torch.bfloat16, keep=True)
    written = (product != 3e4).all(dim=1)
    assert torch.equal(written, written[::16].repeat_interleave(16)[:40]), "programs write all of their rows"
    w1, expected = p.pwconv1_weight.float(), (p.pwconv1_weight.float() * p.norm_weight.float()).bfloat16()
    sums = torch.zeros(2, 40)
    sums[0] = expected.float().sum(1)
    sums[1] += 0 if p.norm_bias is None else w1 @ p.norm_bias.float()
    sums[1] += 0 if p.pwconv1_bias is None else p.pwconv1_bias.float()
    assert torch.equal(product[written], expected[written])
    torch.testing.assert_close(columns[:, written], sums[:, written], rtol=1e-5, atol=1e-5)
    return [row for row in ROWS if written[row]]


def parameters_to_fold(dtype):
    of = {"pwconv1_weight": (40, 24), "norm_weight": (24,), "norm_bias": (24,), "pwconv1_bias": (40,)}
    return NOTHING._replace(**{name: torch.randn(shape).to(dtype) for name, shape in of.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "change", "rewritten"),
    [
        ("pwconv1_weight", one_element_in_place, ROWS),
        ("pwconv1_weight", data_mul, ROWS),
        ("pwconv1_weight", data_swap, ROWS),
        ("norm_weight", one_element_in_place, ROWS),
        ("norm_weight", one_element_of_data, ROWS),
        ("norm_bias", one_element_of_data, ROWS),
        ("pwconv1_bias", one_element_in_place, ROWS),
        ("pwconv1_bias", one_element_of_data, [32]),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_changes_of_what_is_folded(name, change, rewritten, dtype):
    p = parameters_to_fold(dtype)
    assert fold(p) == ROWS
    assert fold(p) == []
    change(getattr(p, name))
    assert fold(p) == rewritten
    assert fold(p) == []


def test_folded_without_biases():
    p = parameters_to_fold(torch.bfloat16)._replace(norm_bias=None, pwconv1_bias=None)
    assert [fold(p), fold(p)] == [ROWS, []]
    assert fold(p._replace(norm_bias=torch.randn(24))) == ROWS


def test_folded_weights_of_a_block():
    """Through an optimizer's step and back through `load_state_dict`: what a block with new memory gives."""

    def run(block):
        with forcing(mlp_forward="gemm", mlp_expand="fold-64x64-k64-s2"), torch.no_grad():
            return block(x)

    def new():
        return FusedConvNeXtBlock(260, kernel_size=3, mlp_ratio=1, backend="triton")

    x, block = torch.randn(1, 260, 3, 3), randomize_(new())
    x, block = x.bfloat16().to(memory_format=torch.channels_last), block.bfloat16()
    state = {name: p.clone() for name, p in block.state_dict().items()}
    before = run(block)
    assert len(weights._entries) == 1
    (entry,) = weights._entries.values()
    for p in block.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    after = run(block)
    other = new().bfloat16()
    other.load_state_dict(block.state_dict())
    assert torch.equal(after, run(other))
    assert not torch.equal(after, before)
    block.load_state_dict(state)
    assert torch.equal(run(block), before)
    entry.memory[: 260 * 260].zero_()
    assert not torch.equal(run(block), before), "nothing has changed, but the weights were folded again"
