"""What other networks than the ConvNeXts of tests/shapes.py run, whole: values and gradients on every backend.

Rectangles, strides, norms, activations and volumes by themselves are rows of tests/shapes.py.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels import BackendError, compat, dispatch
from convnext_kernels.nn import DepthwiseConv1d
from tests.interop.official import ConvNeXtBlock, ConvNeXtV2Block, LayerNorm, MedNeXtBlock
from tests.shapes import DTYPES, EAGER, KERNELS, TRITON, chosen
from tests.test_compat import Reparam
from tests.tolerance import assert_as_good_as_eager, generator, randomize_


class Part(NamedTuple):
    """A module of PyTorch, what makes ours of it, and its input."""

    make: Callable[[], nn.Module]
    ours: Callable[[nn.Module], nn.Module]
    shape: tuple[int, ...]
    condition: list | None = None
    merged: bool = False  # ours has other parameters


def own(kind: type[nn.Module], *arguments: object, **options: object) -> Callable[[nn.Module], nn.Module]:
    def make(original: nn.Module) -> nn.Module:
        module = kind(*arguments, **options)
        module.load_state_dict(original.state_dict())
        return module

    return make


def strided() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.convnext.ConvNeXtBlock(
        8, stride=2, norm_layer=timm.layers.RmsNorm, act_layer="relu", ls_init_value=1.0
    )


BLOCK = ck.FusedConvNeXtBlock1d
PARTS = {
    "sequence": Part(
        lambda: nn.Conv1d(6, 6, 5, 2, padding=6, dilation=3, groups=6),
        own(DepthwiseConv1d, 6, 5, stride=2, dilation=3),
        (2, 6, 21),
    ),
    "Vocos": Part(lambda: ConvNeXtBlock(12, 24), own(BLOCK, 12, mlp_ratio=2), (2, 12, 17)),
    "F5-TTS": Part(
        lambda: ConvNeXtV2Block(12, 48, dilation=2),
        own(BLOCK, 12, use_grn=True, dilation=2, channels_last=True),
        (2, 17, 12),
    ),
    "AdaLayerNorm": Part(  # by itself in training, in inference a part of the block's kernels
        lambda: ConvNeXtBlock(12, 48, count=4), own(BLOCK, 12, adanorm_num_embeddings=4), (3, 12, 17), [[2], [0], [3]]
    ),
    "strided block": Part(strided, ck.accelerate, (2, 8, 9, 8)),
    "MedNeXt": Part(lambda: MedNeXtBlock(6, 6), ck.accelerate, (2, 6, 3, 4, 5)),
    "MedNeXt, GRN, SiLU": Part(lambda: MedNeXtBlock(6, 6, 5, grn=True, act=nn.SiLU), ck.accelerate, (2, 6, 3, 4, 5)),
    "MedNeXt, LayerNorm": Part(
        lambda: MedNeXtBlock(6, 6, norm=LayerNorm(6, data_format="channels_first")), ck.accelerate, (2, 6, 3, 4, 5)
    ),
    "MedNeXt of images": Part(lambda: MedNeXtBlock(6, 6, 7, conv=nn.Conv2d), ck.accelerate, (2, 6, 5, 6)),
    "MedNeXt, down": Part(lambda: MedNeXtBlock(6, 12, 5, stride=2), ck.accelerate, (2, 6, 3, 4, 5)),
    "transposed volume": Part(lambda: nn.ConvTranspose3d(6, 6, 5, 2, 2, 1, groups=6), ck.accelerate, (2, 6, 3, 2, 4)),
    "parallel kernels": Part(lambda: Reparam().eval(), compat.merge, (2, 6, 9, 14), merged=True),
}


def condition_of(part: Part) -> list[Tensor]:
    return [] if part.condition is None else [torch.tensor(part.condition)]


def results(module: nn.Module, x: Tensor, part: Part) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x, *condition_of(part))
    dy = torch.randn(y.shape, generator=generator("dy"), dtype=torch.double).bfloat16().to(y.dtype)
    parameters = {} if part.merged else dict(module.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {"result": y.detach()} | dict(zip(("x", *parameters), found, strict=True))


def everyday(name: str, dtype: torch.dtype, backend: tuple) -> bool:
    """Each part on each backend, in Triton's slow interpreter those with kernels that no other part has.

    There and on eager in one dtype, which alternates; fp16 takes the code of bf16.
    """
    if backend == TRITON and (name in ("strided block", "parallel kernels") or name.startswith("MedNeXt")):
        return name == "MedNeXt, GRN, SiLU" and dtype == torch.bfloat16
    if backend in (EAGER, TRITON):
        return DTYPES.index(dtype) == (list(PARTS).index(name) + KERNELS.index(backend)) % 2
    return dtype != torch.float16 or name == "Vocos"


@chosen(everyday)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_parts(name, dtype, backend):
    part = PARTS[name]
    original = randomize_(part.make()).to(dtype).float()
    ours = part.ours(copy.deepcopy(original)).to(dtype)
    x = torch.randn(part.shape, generator=generator(name), dtype=torch.double).to(dtype)
    reference = results(copy.deepcopy(original).double(), x.double(), part)
    eager = results(original.to(dtype), x, part)
    with dispatch.use_backend(backend):
        if x.dim() == 5 and backend == "cuda":
            with pytest.raises(BackendError, match="cuda: there is no CUDA kernel for volumes"):
                ours(x)
            return
        actual = results(ours, x, part)
        with torch.no_grad():
            actual["inference"] = ours(x, *condition_of(part))
    for found in (reference, eager):
        found["inference"] = found["result"]
    for key, value in reference.items():
        scale = float(key not in ("result", "inference"))  # as in test_parity.py
        assert_as_good_as_eager(actual[key], eager[key], value, what=f"{name}: {key}", scale=scale)
