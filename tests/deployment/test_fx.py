"""`torch.fx` keeps our modules as nodes: a traced model runs the same kernels and has the same bits."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models._features import FeatureListNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

import convnext_kernels as ck
from tests.deployment.test_export import OWN, own
from tests.interop.helpers import MODELS, fused_calls, images
from tests.shapes import chosen
from tests.tolerance import randomize_

# transformers' models check their inputs in Python, which torch.fx cannot trace, accelerated or not.
TRACEABLE = [name for name in MODELS if not name.startswith("transformers")]


def accelerated(name, **options):
    return ck.accelerate(MODELS[name].make(dtype=torch.float32, **options))


def assert_same(traced, model, x):
    """The same bits by the same ops."""
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
        assert fused_calls(lambda: traced(x)) == fused_calls(lambda: model(x))
        assert fused_calls(lambda: model(x))["block"] > 0


@chosen(lambda name: name in ("torchvision", "timm-v2-conv"))
@pytest.mark.parametrize("name", TRACEABLE)
def test_accelerated_model(name):
    m, x = accelerated(name), images(dtype=torch.float32)
    traced = torch.fx.symbolic_trace(m)
    assert_same(traced, m, x)
    assert_same(pickle.loads(pickle.dumps(traced)), m, x)


def test_timms_feature_wrappers():
    x = images(dtype=torch.float32)
    tiny = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    m = randomize_(timm.models.convnext.ConvNeXt(**tiny)).eval()
    indices = (0, 1, 2, 3)
    plain = FeatureListNet(copy.deepcopy(m), out_indices=indices, flatten_sequential=True).eval()
    ck.accelerate(m)
    by_list = FeatureListNet(copy.deepcopy(m), out_indices=indices, flatten_sequential=True).eval()
    later = ck.accelerate(copy.deepcopy(plain))
    by_graph = FeatureGraphNet(copy.deepcopy(m), out_indices=indices).eval()
    created = timm.create_model("convnext_atto", features_only=True, conv_mlp=False, **tiny).eval()
    created.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = by_list(x)
        for wrapper in (later, by_graph, ck.accelerate(created)):
            for a, b in zip(wrapper(x), expected, strict=True):
                assert torch.equal(a, b)
            assert fused_calls(lambda wrapper=wrapper: wrapper(x))["block"] == 4
        for a, b in zip(plain(x), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [kind for kind in OWN if kind != "network"])
def test_own_modules_are_nodes(kind):
    module, x = own(kind, drop=0.5)
    around = nn.Sequential(module.train())
    traced = torch.fx.symbolic_trace(around)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0"]
    results = []
    for model in (traced, around):
        torch.manual_seed(0)
        results.append(model(x))
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match=f"torch.fx cannot trace into {type(module).__name__}, which one op"):
        torch.fx.symbolic_trace(module)
