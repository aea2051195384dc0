"""Blocks and layers of all libraries by themselves: what is served, with which ops, and what is left and why."""

import copy
from functools import partial

import pytest
import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.models.convnext import LayerNorm2d as TorchvisionNorm
from torchvision.ops import StochasticDepth
from transformers import ConvNextConfig
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextLayerNorm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2LayerNorm

import convnext_kernels as ck
from convnext_kernels.nn import DepthwiseConv3d
from tests.interop import official
from tests.interop.helpers import assert_same, fused_calls, reason
from tests.tolerance import randomize_

TIMM = partial(ConvNeXtBlock, 8, ls_init_value=1.0)
MEDNEXT = partial(official.MedNeXtBlock, 6, 6)


class Varied(official.Block):
    """A copy of the official block with another norm and activation."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.norm, self.act = nn.RMSNorm(dim, eps=1e-5), nn.SiLU()


def transformers(act):
    return lambda: ConvNextLayer(ConvNextConfig(hidden_act=act), 8)


def dwconv(kernel_size=7, out_channels=6, **options):
    return lambda: nn.Conv2d(6, out_channels, kernel_size, groups=6, **options)


def downsampling(norm):
    """The form it has in transformers 4."""
    return lambda: nn.Sequential(norm(8, data_format="channels_first"), nn.Conv2d(8, 16, 2, 2))


IMAGE, SIX, TIME = (4, 8, 9, 8), (2, 6, 12, 9), (3, 12, 29)
BOTH = ["dwconv", "mlp"]
SERVED = {  # a module, the shape of its input, the ops that compute it
    "timm, dilated": (partial(TIMM, kernel_size=3, dilation=2), IMAGE, ["block"]),
    "timm, no layer scale": (partial(TIMM, ls_init_value=None), IMAGE, ["block"]),
    "timm, no convolution bias": (partial(TIMM, conv_bias=False), IMAGE, ["block"]),
    "timm, GRN and layer scale, 1x1": (partial(TIMM, use_grn=True, conv_mlp=True), IMAGE, ["block"]),
    "timm, another eps": (partial(TIMM, conv_mlp=True, norm_layer=partial(LayerNorm2d, eps=0.1)), IMAGE, ["block"]),
    "timm, PyTorch's norm": (partial(TIMM, norm_layer=nn.LayerNorm), IMAGE, ["block"]),
    "timm, PyTorch's tanh": (partial(TIMM, act_layer=partial(nn.GELU, approximate="tanh")), IMAGE, ["block"]),
    **{
        f"timm, {name}": (partial(TIMM, act_layer=name), IMAGE, ["block"])
        for name in ("relu", "mish", "quick_gelu", "gelu_tanh")
    },
    "timm, RMSNorm": (partial(TIMM, norm_layer=RmsNorm), IMAGE, ["block"]),
    "timm, RMSNorm of NCHW": (partial(TIMM, norm_layer=RmsNorm2d, conv_mlp=True, use_grn=True), IMAGE, ["block"]),
    "timm, SimpleNorm": (partial(TIMM, norm_layer=partial(SimpleNorm2d, eps=0.1), conv_mlp=True), IMAGE, ["block"]),
    # the convolution, if it is depthwise, and the bottleneck; the shortcut is timm's
    "timm, strided": (partial(TIMM, stride=2), IMAGE, BOTH),
    "timm, strided, V2, 1x1": (partial(TIMM, stride=2, use_grn=True, conv_mlp=True), IMAGE, BOTH),
    "timm, strided, RMSNorm, drop path": (partial(TIMM, stride=2, norm_layer=RmsNorm, drop_path=0.5), IMAGE, BOTH),
    "timm, wider": (partial(TIMM, out_chs=16), IMAGE, ["mlp"]),
    "timm, strided and wider": (partial(TIMM, stride=2, out_chs=16, ls_init_value=None), IMAGE, ["mlp"]),
    "timm, two dilations": (partial(TIMM, dilation=(1, 2)), IMAGE, BOTH),
    "official, no layer scale": (partial(official.Block, 8, layer_scale_init_value=0.0), IMAGE, ["block"]),
    "a copy with another norm": (partial(Varied, 8), IMAGE, ["block"]),
    "a copy of V2 with another norm": (partial(Varied, 8, use_grn=True), IMAGE, ["block"]),
    **{
        f"transformers, {act}": (transformers(act), IMAGE, ["block"])
        for act in ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "relu")
    },
    "transformers, downsampling": (downsampling(ConvNextLayerNorm), IMAGE, ["downsample"]),
    "transformers, downsampling of V2": (downsampling(ConvNextV2LayerNorm), IMAGE, ["downsample"]),
    "InceptionNeXt's row": (dwconv((1, 11), padding=(0, 5)), SIX, ["dwconv"]),
    "InceptionNeXt's column": (dwconv((11, 1), padding="same"), SIX, ["dwconv"]),
    "SLaK": (dwconv((13, 5), padding=(6, 2), bias=False), SIX, ["dwconv"]),
    "VAN, dilated": (dwconv(padding=9, dilation=3), SIX, ["dwconv"]),
    "strided convolution": (dwconv(padding=3, stride=2), SIX, ["dwconv"]),
    "Vocos": (partial(official.ConvNeXtBlock, 12, 40), TIME, ["block"]),
    "Vocos, no layer scale": (partial(official.ConvNeXtBlock, 12, 36, layer_scale=0), TIME, ["block"]),
    "F5-TTS": (partial(official.ConvNeXtV2Block, 12, 24), (3, 29, 12), ["block"]),
    "F5-TTS, dilated": (partial(official.ConvNeXtV2Block, 12, 24, dilation=3), (3, 29, 12), ["block"]),
}


@pytest.mark.parametrize(("make", "shape", "ops"), SERVED.values(), ids=SERVED)
def test_served(make, shape, ops):
    original = randomize_(make()).double()
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(shape).double()
    assert fused_calls(lambda: accelerated(x)) == dict.fromkeys(ops, 1)
    assert_same(accelerated, original, x)
    (row,) = [r for r in ck.acceleration_report(accelerated).rows if not r.name]
    assert row.replaced
    assert accelerated.state_dict().keys() == original.state_dict().keys()
    if hasattr(original, "act"):  # another activation is seen at the next call
        for block in (original, accelerated):
            block.act = nn.ReLU6()
        assert_same(accelerated, original, x)
    assert type(ck.restore(accelerated)) is type(original)


def doubled(kind):
    """The same structure, but another function."""

    class Doubled(kind):
        def forward(self, *inputs):
            return 2 * super().forward(*inputs)

    return Doubled


class Failing(official.Block):
    def forward(self, x):
        raise ValueError("wants a list")


def changed(make, change):
    def made():
        module = make()
        change(module)
        return module

    return made


def volume(kernel_size=3, **options):
    return lambda: nn.Conv3d(4, 4, kernel_size, groups=4, **options)


def transposed(**options):
    return lambda: nn.ConvTranspose3d(4, 4, 3, groups=4, **options)


SPEECH = partial(official.ConvNeXtBlock, 12, 40)
OTHER = "computes something else"
LEFT = {  # a module, words of the reason
    "timm, ELU": (partial(TIMM, act_layer="elu"), "the activation is ELU(alpha=1.0)"),
    "timm, RMSNorm of the wrong layout": (partial(TIMM, norm_layer=RmsNorm2d), "the norm is a RmsNorm2d"),
    "timm, norm without parameters": (
        partial(TIMM, norm_layer=partial(LayerNorm2d, affine=False), conv_mlp=True),
        "the norm has no weight or no bias",
    ),
    "timm, even kernel": (partial(TIMM, kernel_size=4), "the kernel size (4, 4) is not odd and at most 51"),
    "official, doubled": (partial(doubled(official.Block), 8), f"its forward {OTHER}"),
    "official, failing": (partial(Failing, 8), "its forward failed on (2, 8, 5, 4) float64: wants a list"),
    "official, one child more": (
        changed(partial(official.Block, 8), lambda m: setattr(m, "attention", nn.Identity())),
        "its children are dwconv, norm, pwconv1, act, pwconv2, drop_path, attention",
    ),
    "official, eps of the dtype": (
        changed(partial(official.Block, 8), lambda m: setattr(m, "norm", nn.RMSNorm(8))),
        "the norm's eps is None",
    ),
    "torchvision, 3x3 downsampling": (
        lambda: nn.Sequential(TorchvisionNorm(8), nn.Conv2d(8, 16, 3, stride=2, padding=1)),
        "the convolution has kernel size (3, 3) and stride (2, 2)",
    ),
    "Vocos, doubled": (partial(doubled(official.ConvNeXtBlock), 12, 40), OTHER),
    "Vocos, strided": (
        changed(SPEECH, lambda m: setattr(m, "dwconv", nn.Conv1d(12, 12, 7, stride=2, padding=3, groups=12))),
        "stride (2,)",
    ),
    "Vocos, one child more": (
        changed(SPEECH, lambda m: setattr(m, "drop", nn.Dropout())),
        "it has dwconv, norm, pwconv1, act, pwconv2, drop, gamma",
    ),
    "stride 3": (dwconv(padding=3, stride=3), "stride (3, 3)"),
    "stride of one axis": (dwconv(padding=3, stride=(1, 2)), "stride (1, 2)"),
    "even side": (dwconv(8, padding=4), "kernel size (8, 8)"),
    "no padding": (dwconv(), "does not keep the size"),
    "padding with pixels": (dwconv(padding=3, padding_mode="reflect"), "'reflect'"),
    "twice the channels": (dwconv(padding=3, out_channels=12), "6 -> 12"),
    "MedNeXt, doubled": (partial(doubled(official.MedNeXtBlock), 6, 6), OTHER),
    "MedNeXt, groups": (lambda: MEDNEXT(norm=nn.GroupNorm(3, 6)), "the norm has 3 groups of 6 channels"),
    "MedNeXt, BatchNorm": (lambda: MEDNEXT(norm=nn.BatchNorm3d(6)), "the norm is a BatchNorm3d"),
    "MedNeXt, ELU": (partial(MEDNEXT, act=nn.ELU), "the activation is ELU(alpha=1.0)"),
    "volume, 9x9x9": (volume(9, padding=4), "the kernel size (9, 9, 9) is not odd and at most 7"),
    "volume, stride of two axes": (volume(padding=1, stride=(1, 2, 2)), "has stride (1, 2, 2)"),
    "volume, dilated": (volume(padding=2, dilation=2), "has dilation (2, 2, 2)"),
    "volume, no padding": (volume(), "the padding (0, 0, 0), 'zeros' does not keep the size"),
    "transposed, stride 3": (transposed(stride=3, padding=1), "stride (3, 3, 3) and dilation (1, 1, 1), not 2 and 1"),
    "transposed, no padding": (transposed(stride=2), "has padding (0, 0, 0) and output padding (0, 0, 0)"),
    "transposed, one axis": (transposed(stride=2, padding=1, output_padding=(1, 0, 0)), "and output padding (1, 0, 0)"),
    "own layer": (partial(DepthwiseConv3d, 4), "already a fused depthwise convolution"),
    "own block": (partial(ck.FusedConvNeXtBlock, 8), "already a fused block"),
}


@pytest.mark.parametrize(("make", "words"), LEFT.values(), ids=LEFT)
def test_left_and_why(make, words, caplog):
    module = make()
    kind = type(module)
    ck.accelerate(module)
    assert type(module) is kind
    assert words in reason(module)
    others = [r for r in ck.acceleration_report(module).rows if r.replaced]  # its norm, its depthwise convolution
    assert caplog.records or others or "already" in words, "nothing was replaced, and nobody was told"


def set_layer(index, layer):
    return lambda m: m.block.__setitem__(index, layer)


CHANGES = {  # a block, what happens to it, words of the reason
    "ELU": (set_layer(4, nn.ELU()), "the activation is ELU(alpha=1.0)"),
    "another order": (set_layer(1, nn.Identity()), "expected a permutation to [0, 2, 3, 1], got Identity"),
    "strided": (lambda m: setattr(m.block[0], "stride", (2, 2)), "the depthwise convolution has stride (2, 2)"),
    "huge kernel": (set_layer(0, nn.Conv2d(8, 8, 53, padding=26, groups=8)), "at most 51"),
    "padded pointwise": (set_layer(3, nn.Conv2d(8, 32, 1, padding=1)), "a pointwise layer has padding (1, 1)"),
    "other drop path": (lambda m: setattr(m, "stochastic_depth", nn.Dropout(0.1)), "the drop path is a Dropout"),
    "a norm in timm's MLP": (lambda m: setattr(m.mlp, "norm", nn.LayerNorm(32)), "the MLP has a LayerNorm"),
    "timm's other layout": (lambda m: setattr(m, "use_conv_mlp", True), "the norm is a LayerNorm"),
    "timm's 1x1": (lambda m: setattr(m.mlp, "fc1", nn.Conv2d(8, 32, 1)), "the MLP has Conv2d layers, but use_conv_mlp"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change, words, request):
    """Before accelerate such a block is left; after it, it runs its own forward."""
    make = TIMM if "timm" in request.node.callspec.id else partial(CNBlock, 8, 1.0, 0.0)
    left = changed(make, change)()
    ck.accelerate(left)
    assert words in reason(left)
    served = ck.accelerate(make())
    change(served)
    (row,) = [r for r in ck.acceleration_report(served).rows if not r.name]
    assert row.reason.startswith("fused block, backend auto; runs the original forward for now: ")
    assert words in row.reason


@pytest.mark.parametrize(
    ("make", "shape", "dtype"),
    [(partial(TIMM, stride=2, out_chs=8), (2, 8, 8, 8), torch.float32), (MEDNEXT, (1, 6, 5, 6, 7), torch.bfloat16)],
    ids=["timm, strided", "MedNeXt"],
)
def test_under_autocast_and_compiled(make, shape, dtype):
    """The original's dtype, and one graph."""
    original = randomize_(make())
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = accelerated(x), original(x)
        compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == compiled.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)
    assert torch.equal(compiled, y)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_stochastic_depth(mode, p):
    original = randomize_(CNBlock(8, 1.0, 0.0)).double()
    original.stochastic_depth = StochasticDepth(p, mode)
    accelerated = ck.accelerate(copy.deepcopy(original))
    x = torch.randn(16, 8, 5, 5).double()
    assert_same(accelerated, original, x)
    assert fused_calls(lambda: accelerated(x)) == {"block": 1}
    if p == 1.0:
        assert torch.equal(accelerated(x), x)


def test_trial_leaves_no_trace():
    """Parameters, random numbers, modes and hooks are as before."""

    class Block(official.Block):  # a class that was not tried yet
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
