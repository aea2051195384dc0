"""Tiny models of every library, and the means to see what an accelerated one does."""

import copy
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels.bench.numerics import PEER_SLACK, judge
from tests.interop import official
from tests.operators import op_calls
from tests.tolerance import generator, randomize_


def _torchvision(drop: float) -> nn.Module:
    config = torchvision.models.convnext.CNBlockConfig
    blocks = [config(8, 16, 2), config(16, None, 2)]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=drop, num_classes=10)


def _timm(drop: float, **options) -> nn.Module:
    tiny = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 10, "drop_path_rate": drop}
    return timm.models.convnext.ConvNeXt(**{**tiny, **options})


def _transformers(kind: str, drop: float, **options) -> nn.Module:
    sizes = {"hidden_sizes": [8, 16], "depths": [2, 2]}
    if kind != "DINOv3ConvNext":  # which counts its stages itself
        sizes["num_stages"] = 2
    config = getattr(transformers, f"{kind}Config")(**sizes, drop_path_rate=drop, **options)
    classifier = getattr(transformers, f"{kind}ForImageClassification", None)
    return (classifier or getattr(transformers, f"{kind}Model"))(config)


@dataclass(frozen=True)
class Model:
    """A tiny model of 4 blocks."""

    build: Callable[[float], nn.Module]  # from the drop path rate
    block: str  # name of its first block
    linear: str  # a pointwise layer in that block
    downsamplings: int
    norms: int  # LayerNorms over channels outside blocks and downsampling

    def make(self, drop: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return randomize_(self.build(drop)).to(dtype).eval()


_TIMM = ("stages.0.blocks.0", "mlp.fc1", 3, 2)
_V2 = {"use_grn": True, "ls_init_value": None}
_MORE = {"conv_mlp": True, "conv_bias": False, "kernel_sizes": (5, 3, 7, 9), "head_norm_first": True}
_DINOV3 = "model." if hasattr(transformers, "DINOv3ConvNextBackbone") else ""  # that came with transformers 5
MODELS = {
    "torchvision": Model(_torchvision, "features.1.0", "block.3", 1, 2),
    "timm-v1": Model(_timm, *_TIMM),
    "timm-v1-conv": Model(lambda d: _timm(d, **_MORE), *_TIMM),
    "timm-v2": Model(lambda d: _timm(d, **_V2), *_TIMM),
    "timm-v2-conv": Model(lambda d: _timm(d, **_V2, **_MORE), *_TIMM),
    "transformers-v1": Model(
        lambda d: _transformers("ConvNext", d), "convnext.encoder.stages.0.layers.0", "pwconv1", 1, 1
    ),
    "transformers-v2": Model(
        lambda d: _transformers("ConvNextV2", d), "convnextv2.encoder.stages.0.layers.0", "pwconv1", 1, 1
    ),
    "transformers-dinov3": Model(
        lambda d: _transformers("DINOv3ConvNext", d), f"{_DINOV3}stages.0.layers.0", "pointwise_conv1", 1, 1
    ),
    "official-v1": Model(lambda d: official.ConvNeXt(drop_path_rate=d), "stages.0.0", "pwconv1", 1, 1),
    "official-v2": Model(lambda d: official.ConvNeXt(drop_path_rate=d, use_grn=True), "stages.0.0", "pwconv2", 1, 1),
}


def images(n: int = 4, size: int = 64, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=generator("images"), dtype=torch.double).to(dtype)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The classes' scores, or the pooled features of a model without a classifier."""
    y = model(x)
    if isinstance(y, Tensor):
        return y
    return y.logits if "logits" in y else y.pooler_output


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of every parameter and of the input, for one fixed incoming gradient."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = logits(model, x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "input": x.grad}


def saved_and_loaded(model: nn.Module) -> nn.Module:
    """What `torch.save` keeps, which pickles."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def fused_calls(function: Callable[[], object]) -> Counter:
    """How often each of this package's ops was called."""
    return Counter(name for name, *_ in op_calls(function))


def backends_asked_for(function: Callable[[], object]) -> set[str]:
    """The ``backend=`` of every call of this package's ops."""
    return {args[-1] for _, args, _ in op_calls(function)}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """Within what the order of sums may change in a few layers: 1e-12 (fp64) or 2e-5 (fp32) of the largest value."""
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    assert actual.dtype == expected.dtype, what
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(scale, 1e-3), f"{what}: error {error:.2e} at scale {scale:.2e}"


def assert_as_good_as_a_peer(result: Tensor, plain: nn.Module, x: Tensor) -> None:
    """By the rule for peers, whose own arithmetic this is, against the original model in fp64."""
    with torch.no_grad():
        truth, eager = logits(copy.deepcopy(plain).double(), x.double()), logits(plain, x)
    judgement = judge({"logits": truth}, {"logits": eager}, {"logits": result}, torch.float32, slack=PEER_SLACK)
    assert judgement.within, judgement.reason


def assert_same(actual: nn.Module, expected: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """The same results, the same gradients of all parameters and of x, and as many random numbers drawn."""
    results = []
    for model in (actual, expected):
        torch.manual_seed(3)
        y = logits(model, x)
        results.append({"result": y.detach(), **gradients(model, x), "random numbers": torch.rand(1).to(dtype)})
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        assert_close(results[0][name], value, dtype, name)


def reason(module: nn.Module) -> str:
    """What the report says of the module itself, which is not replaced."""
    (row,) = [r for r in ck.acceleration_report(module).rows if not r.name]
    assert not row.replaced
    return row.reason
