"""transformers' ConvNeXt, ConvNeXt V2 and DINOv3 ConvNeXt."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, fused_calls, images, logits

NAMES = ["transformers-v1", "transformers-v2", "transformers-dinov3"]


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states(name):
    """transformers collects them with hooks on the stages, whose class has changed."""
    original = MODELS[name].make()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images()
    expected = original(x, output_hidden_states=True).hidden_states
    actual = accelerated(x, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64)
    assert fused_calls(lambda: accelerated(x, output_hidden_states=True)) == fused_calls(lambda: logits(accelerated, x))


@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained(name, tmp_path):
    m = ck.accelerate(MODELS[name].make())
    x = images()
    m.save_pretrained(tmp_path)
    loaded = type(m).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not fused_calls(lambda: logits(loaded, x))
    assert_close(logits(loaded, x), logits(m, x), torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_hook_on_a_layer_of_the_downsampling(name):
    m = ck.accelerate(MODELS[name].make())
    conv = next(c for n, c in m.named_modules() if isinstance(c, nn.Conv2d) and "downsampl" in n and c.stride == (2, 2))
    fired = []
    handle = conv.register_forward_hook(lambda *_: fired.append(1))
    assert "downsample" not in fused_calls(lambda: logits(m, images()))
    assert fired
    handle.remove()
    assert fused_calls(lambda: logits(m, images()))["downsample"] == 1
