"""transformers' ConvNeXt, ConvNeXt V2 and DINOv3 ConvNeXt."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextLayerNorm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2LayerNorm

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, fused_calls, gradients, images, logits
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


@pytest.mark.parametrize("kind", ["ConvNext", "ConvNextV2", "DINOv3ConvNext"])
def test_backbone(kind):
    config = getattr(transformers, f"{kind}Config")(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage4"]
    )
    if not hasattr(transformers, f"{kind}Backbone"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}Backbone")  # DINOv3's came with 5
    original = randomize_(getattr(transformers, f"{kind}Backbone")(config)).double().eval()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images()
    assert fused_calls(lambda: accelerated(x))["block"] == 4
    assert fused_calls(lambda: accelerated(x))["downsample"] == 3
    expected, actual = original(x).feature_maps, accelerated(x).feature_maps
    assert len(actual) == 2
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64)


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


def test_other_activations_are_left():
    m = layer(hidden_act="tanh")
    ck.accelerate(m)
    assert type(m) is ConvNextLayer
    row, conv = ck.acceleration_report(m).rows
    assert "the activation is" in row.reason
    assert "Tanh" in row.reason
    assert conv.replaced


def test_without_layer_scale():
    m = layer(layer_scale_init_value=0.0)
    assert m.layer_scale_parameter is None
    x = torch.randn(2, 8, 5, 5).double()
    expected, gradient = m(x), gradients(m, x)
    ck.accelerate(m)
    assert fused_calls(lambda: m(x)) == {"block": 1}
    assert_close(m(x), expected, torch.float64)
    for name, g in gradients(m, x).items():
        assert_close(g, gradient[name], torch.float64, name)


def test_keyword_call_reaches_the_original():
    m = ck.accelerate(layer())
    x = torch.randn(2, 8, 5, 5).double()
    assert_close(m(features=x), m(x), torch.float64)
    with pytest.raises(TypeError):
        m(x, unknown=1)


def test_norm_of_the_wrong_format_is_left():
    m = layer()
    m.layernorm.data_format = "channels_first"
    ck.accelerate(m)
    rows = {r.name: r for r in ck.acceleration_report(m).rows}
    assert rows[""].reason == "the norm has data_format='channels_first'"


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
