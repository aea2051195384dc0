"""The official repositories' modules, recognised by their structure and proved by a trial."""

import copy

import torch
from torch import nn

import convnext_kernels as ck
from tests.interop import official as repository


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
    assert all("its forward computes something else" in r.reason for r in rows)
