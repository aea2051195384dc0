"""The official repositories' modules, recognised by their structure and proved by a trial."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from tests.interop import official as repository
from tests.interop.helpers import assert_close, fused_calls, gradients
from tests.tolerance import randomize_


def reason(block):
    (row,) = [r for r in ck.acceleration_report(block).rows if r.kind == "block"]
    return row.reason


@pytest.mark.parametrize("use_grn", [False, True])
def test_without_layer_scale(use_grn):
    original = randomize_(repository.Block(8, layer_scale_init_value=0.0, use_grn=use_grn)).double()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 8, 6, 5).double()
    assert fused_calls(lambda: accelerated(x)) == {"block": 1}
    assert_close(accelerated(x), original(x), torch.float64)
    expected, actual = gradients(original, x), gradients(accelerated, x)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], torch.float64, name)


class Normed(repository.Block):
    """The residual comes after the norm."""

    def forward(self, x):
        return super().forward(x) * 1.001


class Failing(repository.Block):
    def forward(self, x):
        raise ValueError("wants a list")


class Extended(repository.Block):
    def __init__(self, dim):
        super().__init__(dim)
        self.attention = nn.Identity()


class Varied(repository.Block):
    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.norm, self.act = nn.RMSNorm(dim, eps=1e-5), nn.SiLU()


class OwnEps(repository.Block):
    def __init__(self, dim):
        super().__init__(dim)
        self.norm = nn.RMSNorm(dim)


LEFT = {
    Normed: "its forward computes something else",
    Failing: "its forward failed on (2, 8, 5, 4) float64: wants a list",
    Extended: "its children are dwconv, norm, pwconv1, act, pwconv2, drop_path, attention",
    OwnEps: "the norm's eps is None",
}


@pytest.mark.parametrize("use_grn", [False, True])
def test_a_copy_with_another_norm_and_activation(use_grn):
    """Served where the block's own forward uses them, which a run of it shows."""
    original = randomize_(Varied(8, use_grn=use_grn)).double()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 8, 7, 5).double()
    assert fused_calls(lambda: accelerated(x)) == {"block": 1}
    assert_close(accelerated(x), original(x), torch.float64)
    accelerated.act = original.act = nn.ReLU6()  # seen at the next call
    assert_close(accelerated(x), original(x), torch.float64)


@pytest.mark.parametrize(("kind", "expected"), LEFT.items(), ids=lambda v: getattr(v, "__name__", None))
def test_left_and_why(kind, expected):
    m = kind(8)
    ck.accelerate(m)
    assert type(m) is kind
    assert expected in reason(m)


def test_trial_leaves_no_trace():
    """Parameters, random numbers, modes and hooks are as before."""

    class Block(repository.Block):  # a class that was not tried yet
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    block = Block(8, drop_path=0.5).train()
    fired = []
    block.register_forward_hook(lambda *_: fired.append(1))
    before, parameters = torch.get_rng_state(), dict(block.named_parameters())
    values = copy.deepcopy(block.state_dict())
    ck.accelerate(block)
    assert type(block) is not Block
    assert not fired
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in block.modules())
    assert all(p is parameters[name] for name, p in block.named_parameters())
    assert all(torch.equal(v, values[name]) for name, v in block.state_dict().items())


class LayerNorm(repository.LayerNorm):
    """Divides by the unbiased variance."""

    def forward(self, x):
        if self.data_format == "channels_last":
            return super().forward(x)
        variance, mean = torch.var_mean(x, dim=1, keepdim=True)
        return self.weight.view(-1, 1, 1) * (x - mean) / (variance + self.eps).sqrt() + self.bias.view(-1, 1, 1)


def test_other_norms_are_left():
    m = nn.Sequential(LayerNorm(8, data_format="channels_first"), nn.Conv2d(8, 16, 2, 2))
    ck.accelerate(m)
    rows = ck.acceleration_report(m).rows
    assert [(r.name, r.kind) for r in rows] == [("", "downsampling"), ("0", "layer norm")]
    assert not any(r.replaced for r in rows)
    assert all("its forward computes something else" in r.reason for r in rows)
