"""Weights that are cast once per change: every change must be seen, and without one nothing may be written."""

import functools
import gc

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from convnext_kernels.backends.triton import device, weights
from convnext_kernels.calls import MlpCall
from convnext_kernels.spec import MlpParameters

STREAM = 0
SHAPE = (132, 66)  # of two programs, the last one with a tail


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
    parameters = MlpParameters(*[None] * len(MlpParameters._fields))
    parameters = parameters._replace(pwconv1_weight=w1, pwconv2_weight=w2)
    copies = weights.matrices(MlpCall(w1, None, parameters, None, 1e-6, 1e-6, "layer", "gelu", dtype))
    if all((copy == 3e4).all() for copy in copies):
        return False
    for copy, w in zip(copies, (w1, w2), strict=True):
        assert torch.equal(copy, w.flatten(1).to(dtype))
    return True


def one_element(w):
    w.view(-1)[-3] += 100


def data_mul(w):
    w.data.mul_(-1.5)


def data_add(w):
    """Too little to change most of the rounded values."""
    w.data.add_(1e-6)


def data_of_some(w):
    """As clamp_ does: most lines of the matrix stay as they are."""
    w.data[w > 2.5] = 2.5


def data_swap(w):
    w.data = w.data + 1


@pytest.mark.parametrize("which", [0, 1], ids=["w1", "w2"])
@pytest.mark.parametrize("change", [one_element, data_mul, data_add, data_of_some, data_swap], ids=lambda f: f.__name__)
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
    other = weights.kept(*pair, torch.bfloat16, 2 * pair[0].numel(), stream=STREAM + 1)
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
    one_element(ordinary[0])
    assert check(*ordinary)
