"""The workloads of the cases: a plain PyTorch module, the same module with this package, and inputs."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convnext_kernels import FusedConvNeXtBlock, FusedConvNeXtBlock1d, accelerate, functional
from convnext_kernels.models import create_model
from convnext_kernels.nn import DepthwiseConv2d, DepthwiseConv3d, FusedSequential, GlobalResponseNorm, LayerNorm2d
from convnext_kernels.nn.layers import PatchDownsample2d, RMSNorm2d, WideningConv2d


class Step:
    """Forward and backward, to all inputs and parameters; clears the gradients first, as an optimiser does."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.module = module
        self.leaves = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
        self.gradient: Tensor | None = None

    def __call__(self) -> Tensor:
        """Run one step and return the output."""
        self.module.zero_grad(set_to_none=True)
        for leaf in self.leaves:
            leaf.grad = None
        y = self.forward()
        if self.gradient is None:  # the same values for every candidate, in the layout of its y
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            self.gradient = torch.empty_like(y, requires_grad=False).copy_(noise if y.ndim else torch.ones(()))
        y.backward(self.gradient)
        return y

    def forward(self) -> Tensor:
        """Run the forward pass alone."""
        return self.module(*self.leaves)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last call."""
        found = {f"input {i}": leaf.grad for i, leaf in enumerate(self.leaves) if leaf.requires_grad}
        # torch.compile's wrapper adds this prefix to the names of the module it wraps.
        found |= {name.removeprefix("_orig_mod."): p.grad for name, p in self.module.named_parameters()}
        return {f"gradient of {name}": gradient for name, gradient in found.items()}


@dataclass(frozen=True)
class Workload:
    """Modules in fp32 on the CPU, in eval mode; `measure` casts and moves them."""

    eager: nn.Module
    ours: nn.Module | None  # None: a model in which this package replaces nothing
    inputs: tuple[Tensor, ...]  # (N, C, L), (N, C, H, W) or (N, C, D, H, W) fp32; others may follow
    autocast: bool = False  # its modules use autocast, and keep their parameters in fp32
    step: type[Step] = Step  # what a case with a backward pass does
    garbage: float | None = None  # eager is no standard above this relative error; None: numerics.GARBAGE

    @property
    def channels_last(self) -> torch.memory_format:
        """Of its inputs and weights."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return formats.get(self.inputs[0].dim(), torch.contiguous_format)


class EagerDwconv(nn.Conv2d):
    """PyTorch's depthwise convolution, "same" padding. `kernel`: one side, or height and width."""

    def __init__(self, channels: int, kernel: int | tuple[int, int], dilation: int = 1, stride: int = 1) -> None:
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(dilation * (side // 2) for side in sides)
        super().__init__(channels, channels, sides, stride, padding, dilation, channels)


def dwconv3d(channels: int, kernel: int, stride: int = 1) -> nn.Conv3d:
    """PyTorch's depthwise convolution of volumes with a cubic kernel, "same" padding."""
    return nn.Conv3d(channels, channels, kernel, stride, kernel // 2, groups=channels)


def transposed3d(channels: int, kernel: int) -> nn.ConvTranspose3d:
    """PyTorch's depthwise transposed convolution, which doubles each side of a volume (MedNeXt)."""
    return nn.ConvTranspose3d(channels, channels, kernel, 2, kernel // 2, 1, channels)


class _OverChannels:
    """Gives a module of (N, H, W, C) images (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), as torchvision's ConvNeXt computes it."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class EagerLayerNorm2d(_OverChannels, nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""


class EagerRMSNorm2d(_OverChannels, nn.RMSNorm):
    """RMSNorm over the channels of (N, C, H, W)."""


class EagerGRN(nn.Module):
    """Global response normalisation of (N, H, W, C) (arXiv 2301.00808, equations 1-3) or (N, L, C)."""

    def __init__(self, hidden: int, axes: int = 2) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(*[1] * axes, 1, hidden)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        energy = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim() - 1)), keepdim=True)
        response = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class EagerGRN2d(_OverChannels, EagerGRN):
    """Global response normalisation of (N, C, H, W)."""


class EagerMlp(nn.Module):
    """LN -> Linear -> GELU -> [GRN] -> Linear -> gamma -> + residual over the channels, with the official names."""

    def __init__(self, dim: int, use_grn: bool = False, norm: str = "layer", activation: str = "gelu") -> None:
        super().__init__()
        self.norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm](dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = {"gelu": nn.GELU, "silu": nn.SiLU}[activation]()
        self.grn = EagerGRN(4 * dim) if use_grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = None if use_grn else nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add the branch of x to residual, both (N, C, H, W) or (N, C, L)."""
        y = self.act(self.pwconv1(self.norm(x.movedim(1, -1))))
        y = self.pwconv2(y if self.grn is None else self.grn(y))
        return residual + (y if self.gamma is None else self.gamma * y).movedim(-1, 1)


class FusedMlp(EagerMlp):
    """EagerMlp with `functional.inverted_bottleneck`."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add the branch of x to residual, both (N, C, H, W)."""
        parameters = [p for layer in (self.norm, self.pwconv1, self.pwconv2) for p in (layer.weight, layer.bias)]
        grn = {} if self.grn is None else {"grn_weight": self.grn.gamma, "grn_bias": self.grn.beta}
        return functional.inverted_bottleneck(x, *parameters, gamma=self.gamma, residual=residual, **grn)


class EagerBlock(EagerMlp):
    """The block of the papers in plain PyTorch, with the official parameter names."""

    def __init__(self, dim: int, use_grn: bool = False, kernel: int = 7, *variant: str) -> None:
        super().__init__(dim, use_grn, *variant)
        self.dwconv = EagerDwconv(dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return super().forward(self.dwconv(x), x)


class EagerBlock1d(EagerBlock):
    """The block over time, (N, C, L) to (N, C, L) (Vocos, arXiv 2306.00814; with GRN F5-TTS, arXiv 2410.06885)."""

    def __init__(self, dim: int, use_grn: bool = False) -> None:
        super().__init__(dim, use_grn)
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.grn = EagerGRN(4 * dim, axes=1) if use_grn else None


class MedNeXtBlock(nn.Module):
    """MedNeXt's block for volumes (arXiv 2303.09975), with its names: `accelerate` recognises it."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = dwconv3d(dim, kernel)
        self.norm = nn.GroupNorm(dim, dim)
        self.conv2 = nn.Conv3d(dim, 4 * dim, 1)
        self.act = nn.GELU()
        self.conv3 = nn.Conv3d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) to (N, C, D, H, W)."""
        return x + self.conv3(self.act(self.conv2(self.norm(self.conv1(x)))))


class EagerDownsample(nn.Sequential):
    """ConvNeXt's downsampling layer (arXiv 2201.03545, section 2.6), with any patch size."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__(EagerLayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, 2 * dim, patch, stride=patch))


class _SpectralDwconv(nn.Conv2d):
    """Depthwise convolution through FFTs, for fp64 references: PyTorch's own fp64 kernels take minutes for 31x31."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        height, width = x.shape[-2:]
        down, right = self.kernel_size
        size = (height + down - 1, width + right - 1)
        # The layer is a correlation, an FFT product a convolution: flip the kernel.
        spectrum = torch.fft.rfft2(x, s=size) * torch.fft.rfft2(self.weight[:, 0].flip(-2, -1), s=size)
        y = torch.fft.irfft2(spectrum, s=size)[..., down // 2 : down // 2 + height, right // 2 : right // 2 + width]
        return y if self.bias is None else y + self.bias[:, None, None]


def reference(module: nn.Module) -> nn.Module:
    """Copy `module` in fp64, with the parameter values of its dtype."""
    copied = copy.deepcopy(module).double()
    for conv in copied.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels:
            down, right = conv.kernel_size
            same = conv.padding == (down // 2, right // 2) and conv.dilation == (1, 1) and down % 2 and right % 2
            if same and conv.stride == (1, 1) and conv.padding_mode == "zeros":
                conv.__class__ = _SpectralDwconv
    return copied


LAYER_SCALES = {"layer_scale", "layer_scale_parameter", "gamma"}  # torchvision, transformers, timm and official


def initialise(model: nn.Module, seed: int = 0) -> None:
    """Initialise every parameter, from a fixed seed, so that it affects the output.

    A new ConvNeXt has layer scale 1e-6 and GRN parameters 0: its blocks change the logits by less than a
    rounding error, and a comparison would show nothing. Here layer scales are in 0.5-1, GRN parameters are normal
    with deviation 0.5, and matrices keep the variance of their input.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__.lower()
            is_grn = "grn" in kind or "globalresponse" in kind
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d | nn.Linear) and name == "weight":
                    fan_in = parameter[0].numel()
                    parameter.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
                elif is_grn:
                    parameter.normal_(0, 0.5, generator=generator)
                elif name in LAYER_SCALES:
                    parameter.uniform_(0.5, 1, generator=generator)
                elif name == "weight":  # of a normalisation
                    parameter.uniform_(0.75, 1.25, generator=generator)
                else:
                    parameter.normal_(0, 0.1, generator=generator)


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


NORMS2D = {"layer": (EagerLayerNorm2d, LayerNorm2d), "rms": (EagerRMSNorm2d, RMSNorm2d)}
# The modules of each op, plain PyTorch's and ours, by the channels and the options that follow the shape.
PAIRS: dict[str, Callable[..., tuple[nn.Module, nn.Module]]] = {
    "dwconv": lambda c, kernel, dilation=1, stride=1: (
        EagerDwconv(c, kernel, dilation, stride),
        DepthwiseConv2d(c, kernel, dilation=dilation, stride=stride),
    ),
    "dwconv3d": lambda c, kernel, _depth, stride=1: (
        dwconv3d(c, kernel, stride),
        DepthwiseConv3d(c, kernel, stride=stride),
    ),
    "dwconv3d_transposed": lambda c, kernel, _depth: (transposed3d(c, kernel), accelerate(transposed3d(c, kernel))),
    "layernorm": lambda c, norm="layer": tuple(kind(c, eps=1e-6) for kind in NORMS2D[norm]),
    "grn": lambda c: (EagerGRN2d(c), GlobalResponseNorm(c)),
    "mlp": lambda c, use_grn: (EagerMlp(c, use_grn), FusedMlp(c, use_grn)),
    "block": lambda c, use_grn, kernel=7, norm="layer", activation="gelu": (
        EagerBlock(c, use_grn, kernel, norm, activation),
        FusedConvNeXtBlock(c, use_grn=use_grn, kernel_size=kernel, norm=norm, activation=activation),
    ),
    "block1d": lambda c, use_grn: (EagerBlock1d(c, use_grn), FusedConvNeXtBlock1d(c, use_grn=use_grn)),
    "mednext": lambda c, kernel, _depth: (MedNeXtBlock(c, kernel), accelerate(MedNeXtBlock(c, kernel))),
    "downsample": lambda c, patch: (EagerDownsample(c, patch), PatchDownsample2d(c, 2 * c, patch)),
}


def op(name: str, n: int, c: int, h: int, w: int, *options: object) -> Workload:
    """A row of PAIRS. A block over time has one row, h = 1; of volumes the depth is the second of the options."""
    eager, ours = PAIRS[name](c, *options)
    initialise(eager)
    ours.load_state_dict(eager.state_dict())
    volume = name in ("dwconv3d", "dwconv3d_transposed", "mednext")
    sides = (options[1], h, w) if volume else (w,) if name.endswith("block1d") else (h, w)
    inputs = tuple(_images(n, c, *sides) for _ in range(2 if name == "mlp" else 1))  # mlp: x and the residual
    return Workload(eager.eval(), ours.eval(), inputs)


def load(library: str, name: str, pretrained: bool = False) -> nn.Module:
    """A classifier of torchvision or timm, with downloaded weights or the initialisation of its library."""
    if library == "torchvision":
        from torchvision import models

        return models.get_model(name, weights="DEFAULT" if pretrained else None).eval()
    import timm

    return timm.create_model(name, pretrained=pretrained).eval()


def convnext(library: str, name: str, n: int, size: int) -> Workload:
    """A ConvNeXt classifier of `library` with random weights, see `initialise`."""
    eager = load(library, name)
    initialise(eager)
    return Workload(eager, accelerate(copy.deepcopy(eager)), (_images(n, 3, size, size),))


def plain(module: nn.Module) -> nn.Module:
    """One of this package's networks with plain PyTorch in the place of its layers, and the same parameters."""
    if isinstance(module, FusedConvNeXtBlock):
        new = EagerBlock(module.dwconv.weight.shape[0], module.grn is not None, module.dwconv.weight.shape[-1])
    elif isinstance(module, PatchDownsample2d):
        new = EagerDownsample(module[1].in_channels, module[1].kernel_size[0])
    elif isinstance(module, LayerNorm2d):
        new = EagerLayerNorm2d(module.weight.numel(), eps=module.eps)
    else:
        for name, child in module.named_children():
            setattr(module, name, plain(child))
        plain_class = {FusedSequential: nn.Sequential, WideningConv2d: nn.Conv2d}
        module.__class__ = plain_class.get(type(module), type(module))
        return module
    new.load_state_dict(module.state_dict())
    return new


def network(name: str, n: int, size: int) -> Workload:
    """A ConvNeXt of this package, and the same one in plain PyTorch: needs no other library."""
    ours = create_model(name).eval()
    initialise(ours)
    return Workload(plain(copy.deepcopy(ours)).eval(), ours, (_images(n, 3, size, size),))


def rival(library: str, name: str, n: int, size: int) -> Workload:
    """A classifier that is not a ConvNeXt, with the initialisation of its library."""
    return Workload(load(library, name), None, (_images(n, 3, size, size),))
