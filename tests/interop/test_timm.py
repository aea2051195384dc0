"""timm's ConvNeXt V1 and V2."""

import copy

import timm
import torch
from timm.models.convnext import ConvNeXtBlock

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_close, assert_same, fused_calls, images
from tests.tolerance import randomize_


def test_dropout_in_the_mlp():
    """Nothing to fuse while it drops, and nothing in the way in eval mode."""
    original = randomize_(ConvNeXtBlock(8, ls_init_value=1.0)).double()
    original.mlp.drop1.p = 0.5
    accelerated = ck.accelerate(copy.deepcopy(original).eval()).train()
    x = torch.randn(4, 8, 5, 5).double()
    outputs = []
    for m in (original, accelerated):
        torch.manual_seed(1)
        outputs.append(m(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not fused_calls(lambda: accelerated(x))
    (row,) = ck.acceleration_report(accelerated).rows
    assert "runs the original forward for now: the MLP has Dropout(p=0.5, inplace=False) in training" in row.reason
    assert fused_calls(lambda: accelerated.eval()(x)) == {"block": 1}


def test_a_model_with_another_norm_and_activation():
    """timm's own entry points: every block, norm and downsampling layer, logits and gradients."""
    original = randomize_(timm.create_model("convnext_zepto_rms_ols", num_classes=7)).double().eval()
    accelerated = ck.accelerate(copy.deepcopy(original))
    assert all(r.replaced for r in ck.acceleration_report(accelerated).rows)
    x = images(2, 32)
    assert_same(accelerated, original, x)
    with torch.no_grad():  # stages in one call where the backend has one
        assert_close(accelerated.float()(x.float()), original(x).float(), torch.float32)
    assert ck.restore(accelerated).state_dict().keys() == original.state_dict().keys()


def test_checkpointing_and_intermediates():
    original = MODELS["timm-v2"].make()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = images()
    accelerated.set_grad_checkpointing()
    assert_same(accelerated.train(), original, x)
    accelerated.eval()
    for a, e in zip(accelerated.forward_intermediates(x)[1], original.forward_intermediates(x)[1], strict=True):
        assert_close(a, e, torch.float64)
