"""What timm's, transformers', InceptionNeXt's and Vocos' models do with their blocks."""

import copy

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn

import convnext_kernels as ck
from tests.interop import official
from tests.interop.helpers import MODELS, assert_close, assert_same, fused_calls, images, logits
from tests.tolerance import randomize_

of_transformers = pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("transformers")])


def test_dropout_in_the_mlp():
    """Nothing to fuse while it drops, and nothing in the way in eval mode."""
    original = randomize_(ConvNeXtBlock(8, ls_init_value=1.0)).double()
    original.mlp.drop1.p = 0.5
    accelerated = ck.accelerate(copy.deepcopy(original).eval()).train()
    x = torch.randn(4, 8, 5, 5).double()
    assert_same(accelerated, original, x)
    assert not fused_calls(lambda: accelerated(x))
    (row,) = ck.acceleration_report(accelerated).rows
    assert "runs the original forward for now: the MLP has Dropout(p=0.5, inplace=False) in training" in row.reason
    assert fused_calls(lambda: accelerated.eval()(x)) == {"block": 1}


def test_checkpointing_and_intermediates():
    original = MODELS["timm-v2"].make()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images()
    accelerated.set_grad_checkpointing()
    assert_same(accelerated.train(), original, x)
    accelerated.eval()
    torch.testing.assert_close(accelerated.forward_intermediates(x), original.forward_intermediates(x))


@of_transformers
def test_hidden_states(name):
    """transformers collects them with hooks on the stages, whose class has changed."""
    original = MODELS[name].make()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images()
    expected = original(x, output_hidden_states=True).hidden_states
    actual = accelerated(x, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    torch.testing.assert_close(actual, expected)
    assert fused_calls(lambda: accelerated(x, output_hidden_states=True)) == fused_calls(lambda: logits(accelerated, x))


@of_transformers
def test_save_pretrained(name, tmp_path):
    m = ck.accelerate(MODELS[name].make())
    x = images()
    m.save_pretrained(tmp_path)
    loaded = type(m).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not fused_calls(lambda: logits(loaded, x))
    assert_close(logits(loaded, x), logits(m, x), torch.float64)


@of_transformers
def test_hook_on_a_layer_of_the_downsampling(name):
    m = ck.accelerate(MODELS[name].make())
    conv = next(c for n, c in m.named_modules() if isinstance(c, nn.Conv2d) and "downsampl" in n and c.stride == (2, 2))
    fired = []
    handle = conv.register_forward_hook(lambda *_: fired.append(1))
    assert "downsample" not in fused_calls(lambda: logits(m, images()))
    assert fired
    handle.remove()
    assert fused_calls(lambda: logits(m, images()))["downsample"] == 1


def test_a_network_of_inception():
    """Large depthwise convolutions of no block that is known; hooks on the layer itself, exported operators."""
    original = timm.create_model("inception_next_atto", num_classes=5).eval()
    for parameter in original.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1)
    accelerated = ck.accelerate(copy.deepcopy(original))
    report = ck.acceleration_report(accelerated)
    assert report.replaced == len(report.rows) == 2 * sum(len(stage.blocks) for stage in original.stages)
    x, seen = torch.randn(1, 3, 64, 64), []
    accelerated.stages[0].blocks[0].token_mixer.dwconv_w.register_forward_hook(lambda *a: seen.append(a))
    with torch.no_grad():
        expected = original(x)
        torch.testing.assert_close(accelerated(x), expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == 1
        exported = torch.export.export(accelerated, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


def test_small_calls_stay_pytorchs(monkeypatch):
    """On a CPU in fp32 inference, where the kernel gains less than its call takes; not with a backend by name."""
    called = []
    ours = ck.functional.depthwise_conv2d
    monkeypatch.setattr(ck.functional, "depthwise_conv2d", lambda *a, **k: called.append(1) or ours(*a, **k))
    row = ck.accelerate(nn.Conv2d(6, 6, (1, 11), padding=(0, 5), groups=6))
    small, large = torch.randn(1, 6, 14, 14), torch.randn(1, 6, 130, 130)
    for x, backend, grad, calls in (
        (small, "auto", False, 0),
        (large, "auto", False, 1),
        (small, "auto", True, 1),
        (small, "eager", False, 1),
        (small.bfloat16(), "auto", False, 1),
    ):
        ck.accelerate(row, backend=backend)
        with torch.set_grad_enabled(grad):
            row.to(x.dtype)(x)
        assert len(called) == calls
        called.clear()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_condition_for_each_sample(compiled, fresh_compiler):
    """In Vocos' block with AdaLayerNorm: no constant of a graph. Samples may share one, or have one of their own, also
    where values cannot be read, as in a compiled graph and on a GPU.
    """
    original = randomize_(official.ConvNeXtBlock(12, 40, count=4)).double()
    accelerated, x = ck.accelerate(copy.deepcopy(original)), torch.randn(3, 12, 29, dtype=torch.double)
    assert fused_calls(lambda: accelerated(x, torch.tensor([[3], [3], [3]]))) == {"block": 1}
    run = torch.compile(accelerated, fullgraph=True, backend="aot_eager") if compiled else accelerated
    for condition in ([[3], [1], [3]], [1], [3]):
        results = []
        for module in (original, run):
            given = x.clone().requires_grad_()
            y = module(given, cond_embedding_id=torch.tensor(condition))
            results.append((y, *torch.autograd.grad(y.sin().sum(), [given, *module.parameters()])))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
