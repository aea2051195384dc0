"""The family: sizes against the papers' figures, what it returns, wrong arguments."""

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import nn as cknn
from convnext_kernels.models import ConvNeXt, create_model, list_models, published
from convnext_kernels.models.counting import count

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}


def small(**options):
    torch.manual_seed(0)
    return ConvNeXt(**{**SMALL, "layer_scale_init_value": 1.0, **options}).eval()


@pytest.mark.parametrize("row", published.models(), ids=lambda row: f"{row.name}-{row.size}")
def test_parameters_and_gflops_are_the_published_ones(row):
    with torch.device("meta"):
        model = create_model(row.name)
    found = count(model, row.size)
    assert row.parameters.met_by(found.parameters / 1e6, 0.01), (found.parameters, row.parameters)
    assert row.gflops.met_by(found.multiply_adds / 1e9, 0.01), (found.multiply_adds, row.gflops)


def test_every_model_has_published_figures():
    assert {row.name for row in published.models()} == set(list_models())


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (45, 71)])
def test_any_resolution(use_grn, height, width):
    model = small(use_grn=use_grn, num_classes=10)
    x = torch.randn(2, 3, height, width)
    sizes = [(2, c, height // 4 // 2**i, width // 4 // 2**i) for i, c in enumerate(model.dims)]
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        assert [m.shape for m in model.forward_stages(x)] == sizes
        with ck.use_backend("eager"):
            torch.testing.assert_close(model(x), model(x.contiguous(memory_format=torch.channels_last)))


def test_feature_pyramid():
    classifier = small()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stages = classifier.forward_stages(x)
        for indices in ((0, 1, 2, 3), (3, 1), (-1,), (0, 2)):
            pyramid = small(features_only=True, out_indices=indices)
            pyramid.load_state_dict(classifier.state_dict(), strict=False)
            maps = pyramid(x)
            assert len(maps) == len(pyramid.feature_info) == len(indices)
            for i, found, info in zip(indices, maps, pyramid.feature_info, strict=True):
                assert torch.equal(found, stages[i])
                assert (info.channels, 64 // info.stride) == (found.shape[1], found.shape[2])


def test_head_options():
    x = torch.randn(2, 3, 64, 96)
    model = small(num_classes=5, drop_rate=0.5)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert features.shape == (2, 32)
        torch.testing.assert_close(model(x), model.head(features))
        dense = small(num_classes=5, global_pool="")
        assert dense(x).shape == (2, 5, 2, 3)
        bare = small(num_classes=0)
        assert not any(key.startswith("head") for key in bare.state_dict())
        torch.testing.assert_close(bare(x), features)
        model.reset_head(7)
        assert model(x).shape == (2, 7)
        assert model.num_classes == 7
        model.reset_head(0)
        assert torch.equal(model(x), features)
    assert small(head_init_scale=0.0).head.weight.abs().max() == 0


def test_stochastic_depth_grows_linearly():
    blocks = [m for m in small(drop_path_rate=0.4).modules() if isinstance(m, cknn.FusedConvNeXtBlock)]
    rates = [block.drop_path.drop_prob for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
