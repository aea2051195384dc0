"""The ConvNeXt block as one module."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from convnext_kernels import functional
from convnext_kernels.exporting import Whole
from convnext_kernels.nn.layers import (
    DepthwiseConv2d,
    DropPath,
    GlobalResponseNorm,
    LayerNorm2d,
    QuickGELU,
    RMSNorm2d,
    SimpleNorm2d,
    positive_int,
)
from convnext_kernels.ops import checks
from convnext_kernels.ops.blocks import Block, block
from convnext_kernels.variants import ACTIVATIONS, NORMS

_NORMS = {"layer": LayerNorm2d, "rms": RMSNorm2d, "simple": SimpleNorm2d}
_ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, "tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
}


class FusedConvNeXtBlock(Whole, nn.Module):
    """Drop-in for the official ConvNeXt ``Block``: V1 (arXiv 2201.03545) or, with `use_grn`, V2 (2301.00808).

    Its state dict has the official names and shapes: ``dwconv``, ``norm``, ``pwconv1``, ``pwconv2`` and, for
    V1, ``gamma`` (absent when `layer_scale_init_value` is 0 or less) or, for V2, ``grn.gamma`` and ``grn.beta``.

    Args:
        dim: channels C.
        drop_path: probability to drop a sample's branch in training, 0 up to but not including 1.
        layer_scale_init_value: first value of ``gamma``; no effect in V2, which has no ``gamma``.
        kernel_size: of the depthwise kernel, one side or (height, width), odd, up to 51.
        mlp_ratio: hidden width over `dim`, a positive integer.
        dilation: of the depthwise convolution, one or (of height, of width).
        use_grn: build the V2 block.
        eps: of the norm.
        norm: "layer", "rms" or "simple"; the last two have a weight and no bias (`functional.inverted_bottleneck`).
        activation: "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "relu", "relu6" or "hardswish".
        memory: what training keeps for the gradient, "auto", "min" or "balanced"; see `functional.convnext_block`.
        backend: "auto" or a name of `convnext_kernels.list_backends()`.

    Raises TypeError or ValueError for an argument outside these ranges; forward raises what
    `functional.convnext_block` raises.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        *,
        kernel_size: int | tuple[int, int] = 7,
        mlp_ratio: int = 4,
        dilation: int | tuple[int, int] = 1,
        use_grn: bool = False,
        eps: float = 1e-6,
        norm: str = "layer",
        activation: str = "gelu",
        memory: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.backend(backend)
        checks.memory(memory, nothing=False)
        checks.choice("norm", norm, NORMS)
        checks.choice("activation", activation, ACTIVATIONS)
        checks.number("layer_scale_init_value", layer_scale_init_value)
        if not math.isfinite(layer_scale_init_value):
            raise ValueError(f"layer_scale_init_value: expected a finite number, got {layer_scale_init_value}")
        factory = {"device": device, "dtype": dtype}
        hidden = positive_int("dim", dim) * positive_int("mlp_ratio", mlp_ratio)
        self.dwconv = DepthwiseConv2d(dim, kernel_size, dilation=dilation, **factory)
        self.norm = _NORMS[norm](dim, eps, **factory)
        self.pwconv1 = nn.Linear(dim, hidden, **factory)
        self.act = _ACTIVATIONS[activation]()
        self.grn = GlobalResponseNorm(hidden, **factory) if use_grn else None
        self.pwconv2 = nn.Linear(hidden, dim, **factory)
        self.gamma = None
        if not use_grn and layer_scale_init_value > 0:
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value, **factory))
        self.drop_path = DropPath(drop_path)
        self.norm_name = norm  # `norm` is the layer
        self.activation = activation
        self.memory = memory
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), in x's memory format."""
        if isinstance(x, Proxy):
            return self.node(x)
        return self._compute(x, self._parts())

    def _compute(self, x: Tensor, parts: tuple) -> Tensor:
        dilation, norm, grn, drop_path, tensors = parts
        dropping = drop_path.drop_prob and drop_path.training
        if type(x) is not Tensor or dropping:
            checks.image("x", x)  # drop path uses x before the op checks it
        return functional.block_of(
            (x, *tensors, drop_path.scale(x) if dropping else None),
            dilation,
            norm.eps,
            1e-6 if grn is None else grn.eps,
            self.norm_name,
            self.activation,
            self.memory,
            self.backend,
        )

    def inference_block(self) -> tuple[Block, str] | None:
        """What `forward` computes with in inference, and the backend; for `FusedSequential`."""
        dilation, norm, grn, drop_path, tensors = self._parts()
        if drop_path.drop_prob and drop_path.training:
            return None
        grn_eps = 1e-6 if grn is None else grn.eps
        options = {"norm": self.norm_name, "activation": self.activation}
        return block(*tensors, dilation=dilation, eps=norm.eps, grn_eps=grn_eps, **options), self.backend

    def _parts(self) -> tuple:
        # From the dictionaries: nn.Module looks attributes up in Python, 0.4 us each.
        modules = self._modules
        dwconv, norm, pwconv1, pwconv2 = modules["dwconv"], modules["norm"], modules["pwconv1"], modules["pwconv2"]
        grn, drop_path = modules.get("grn"), modules["drop_path"]
        own, conv, ln = self._parameters, dwconv._parameters, norm._parameters
        fc1, fc2 = pwconv1._parameters, pwconv2._parameters
        try:
            tensors = conv["weight"], conv["bias"], ln["weight"], ln["bias"]
            tensors += fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"]
        except KeyError:  # a weight that a parametrisation computes
            for name in ("pwconv1", "pwconv2"):
                kind = type(modules[name])
                if not issubclass(kind, nn.Linear):  # a quantised layer, LoRA: its weight is not all that it computes
                    raise TypeError(
                        f"{name}: expected a torch.nn.Linear, got {kind.__module__}.{kind.__qualname__}, which the op "
                        "of the whole block does not compute"
                    ) from None
            tensors = dwconv.weight, dwconv.bias, norm.weight, norm.bias
            tensors += pwconv1.weight, pwconv1.bias, pwconv2.weight, pwconv2.bias
        try:
            gamma = own["gamma"]
        except KeyError:  # None, or parametrised
            gamma = self.gamma
        grn_tensors = (None, None) if grn is None else (grn.gamma, grn.beta)
        return dwconv.dilation, norm, grn, drop_path, (*tensors, gamma, *grn_tensors)
