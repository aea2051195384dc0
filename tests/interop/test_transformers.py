"""transformers' ConvNeXt, ConvNeXt V2 and DINOv3 ConvNeXt."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextLayerNorm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2LayerNorm

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, fused_calls, images, logits
from tests.tolerance import randomize_

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


def layer(**options):
    config = transformers.ConvNextConfig(**options)
    return randomize_(ConvNextLayer(config, 8)).double()


@pytest.mark.parametrize("act", ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_are_served(act):
    m = layer(hidden_act=act)
    x = torch.randn(2, 8, 5, 5).double()
    expected = m(x)
    ck.accelerate(m)
    assert fused_calls(lambda: m(x)) == {"block": 1}
    assert_close(m(x), expected, torch.float64)


@pytest.mark.parametrize("norm", [ConvNextLayerNorm, ConvNextV2LayerNorm])
def test_sequential_downsampling(norm):
    """The form it has in transformers 4."""
    pair = randomize_(nn.Sequential(norm(8, data_format="channels_first"), nn.Conv2d(8, 16, 2, 2))).double()
    x = torch.randn(2, 8, 6, 6).double()
    expected = pair(x)
    ck.accelerate(pair)
    assert fused_calls(lambda: pair(x)) == {"downsample": 1}
    assert_close(pair(x), expected, torch.float64)
    pair[0].data_format = "channels_last"
    assert "the norm has data_format='channels_last'" in ck.acceleration_report(pair).rows[0].reason


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
