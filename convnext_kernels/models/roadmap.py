"""The modernization path from ResNet to ConvNeXt (arXiv 2201.03545, section 2); a network for each step.

The steps are the rows of the paper's tables 10 and 11.
Each step changes one thing in the design of the step before (`STEPS`); the last one is ConvNeXt itself. The paper
describes the steps in words; its authors published code for the last one only. Where the words leave a choice open,
we took the one whose multiply-adds equal the printed ones (``convnext-kernels roadmap`` prints both).

Regimes: "resnet50" ends in ConvNeXt-T, "resnet200" in ConvNeXt-B.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from convnext_kernels.models.convnext import EPS, create_model, near
from convnext_kernels.nn import DepthwiseConv2d, FusedConvNeXtBlock, LayerNorm2d

REGIMES = {"resnet50": "convnext_tiny", "resnet200": "convnext_base"}  # name -> the last network
EXPANSION = 4


@dataclass(frozen=True)
class Design:
    """The properties that the steps change. `width` is the C of the first stage, doubled at every further one."""

    depths: tuple[int, ...]
    width: int = 64
    patchify: bool = False  # 4x4 convolution with stride 4 instead of 7x7 with stride 2 and max-pooling
    block: str = "bottleneck"  # "bottleneck", "inverted" or "moved up"
    depthwise: bool = False  # the bottleneck's 3x3 grouped by channel
    kernel_size: int = 3
    gelu: bool = False
    fewer_activations: bool = False  # one, between the 1x1 convolutions
    fewer_norms: bool = False  # one, before the first 1x1 convolution
    layer_norm: bool = False
    separate_downsampling: bool = False


@dataclass(frozen=True)
class Step:
    """A row of the paper's tables: a name for the command line, the paper's words, what changes."""

    name: str
    title: str
    changes: Callable[[str], dict[str, object]]  # regime -> fields of `Design`
    adopted: bool = True  # the next steps build on it


def _always(**changes: object) -> Callable[[str], dict[str, object]]:
    return lambda regime: changes


# The 3:3:27:3 ratio gives ResNet-200 fewer blocks, and table 11 compensates with width: 84 and, later, 128 give its
# GFLOPs (14.52, 16.76). ResNet-50's 64 and 96 are in the paper's text.
STEPS = (
    Step("resnet_original", "ResNet (original recipe)", _always()),  # the same network, trained as in 2015
    Step("resnet", "ResNet (enhanced recipe)", _always()),
    Step(
        "stage_ratio",
        "stage ratio (R200: and width)",
        lambda r: {"depths": (3, 3, 9, 3)} if r == "resnet50" else {"depths": (3, 3, 27, 3), "width": 84},
    ),
    Step("patchify_stem", "patchify stem", _always(patchify=True)),
    Step("depthwise", "depthwise conv", _always(depthwise=True)),
    Step("width", "increase width", lambda r: {"width": 96 if r == "resnet50" else 128}),
    Step("inverted_bottleneck", "inverting dimensions", _always(block="inverted")),
    Step("move_up", "move up depthwise conv", _always(block="moved up")),
    Step("kernel_5", "kernel size 5", _always(kernel_size=5)),
    Step("kernel_7", "kernel size 7", _always(kernel_size=7)),
    Step("kernel_9", "kernel size 9 (not adopted)", _always(kernel_size=9), adopted=False),
    Step("kernel_11", "kernel size 11 (not adopted)", _always(kernel_size=11), adopted=False),
    Step("gelu", "ReLU to GELU", _always(gelu=True)),
    Step("fewer_activations", "fewer activations", _always(fewer_activations=True)),
    Step("fewer_norms", "fewer norms", _always(fewer_norms=True)),
    Step("layer_norm", "BN to LN", _always(layer_norm=True)),
    Step("convnext", "separate downsampling (ConvNeXt)", _always(separate_downsampling=True)),
)


def list_steps() -> list[str]:
    """Return the names of the steps, in the paper's order."""
    return [step.name for step in STEPS]


def design(step: str, regime: str = "resnet50") -> Design:
    """Return the design after `step`. Raises ValueError for unknown names, with similar ones."""
    if regime not in REGIMES:
        raise ValueError(f"regime: unknown regime {regime!r}; {near(regime, list(REGIMES))}")
    if step not in list_steps():
        raise ValueError(f"step: unknown step {step!r}; {near(step, list_steps())}")
    found = Design((3, 4, 6, 3) if regime == "resnet50" else (3, 24, 36, 3))
    for candidate in STEPS:
        if candidate.adopted or candidate.name == step:
            found = replace(found, **candidate.changes(regime))
        if candidate.name == step:
            break
    return found


def create_step(step: str, regime: str = "resnet50", **options: object) -> nn.Module:
    """Build the network of a step, randomly initialised: (N, in_chans, H, W) images to (N, num_classes) logits.

    `options` are `in_chans`, `num_classes` and `backend`; for the last step all options of `ConvNeXt`. The last step
    is ``convnext_tiny`` or ``convnext_base`` itself. Raises ValueError for unknown names, with similar ones.
    """
    found = design(step, regime)
    if found.separate_downsampling:
        return create_model(REGIMES[regime], **options)
    return RoadmapNet(found, **options)


class RoadmapNet(nn.Module):
    """A network between ResNet and ConvNeXt; see `Design`.

    Depthwise convolutions of stride 1 run on this package's kernels. Blocks that are ConvNeXt blocks without
    ``gamma`` are the fused one. Everything else is PyTorch's.
    """

    def __init__(self, design: Design, *, in_chans: int = 3, num_classes: int = 1000, backend: str = "auto") -> None:
        super().__init__()
        if design.separate_downsampling:
            raise ValueError("design: a network with separate downsampling is a ConvNeXt; use create_step")
        self.design = design
        if design.patchify:
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, design.width, 4, 4, bias=design.layer_norm), _norm(design, design.width, backend)
            )
        else:
            conv = nn.Conv2d(in_chans, design.width, 7, 2, 3, bias=False)
            self.stem = nn.Sequential(
                conv, _norm(design, design.width, backend), _activation(design), nn.MaxPool2d(3, 2, 1)
            )
        bottleneck = design.block == "bottleneck"
        channels, stages = design.width, []
        for i, depth in enumerate(design.depths):
            width = design.width * 2**i
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(_block(design, channels, width, stride, backend))
                channels = EXPANSION * width if bottleneck else width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.head(self.stages(self.stem(x)).mean((-2, -1)))


class _Residual(nn.Module):
    """shortcut(x) + branch(x), then the activation, if the block ends in one."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = branch, shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.branch(x))


def _activation(design: Design) -> nn.Module:
    return nn.GELU() if design.gelu else nn.ReLU()


def _norm(design: Design, channels: int, backend: str) -> nn.Module:
    return LayerNorm2d(channels, EPS, backend=backend) if design.layer_norm else nn.BatchNorm2d(channels)


def _conv(
    design: Design, channels: int, out: int, stride: int, kernel: int, before_norm: bool, backend: str
) -> nn.Module:
    """A convolution of a branch; without bias before a BatchNorm, which would remove it."""
    bias = design.layer_norm or not before_norm
    if kernel == 1 or not design.depthwise:
        return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=bias)
    return DepthwiseConv2d(channels, kernel, stride=stride, bias=bias, backend=backend)


def _block(design: Design, channels: int, width: int, stride: int, backend: str) -> nn.Module:
    """One residual block from `channels` to 4 x `width` (bottleneck) or to `width`."""
    narrow, wide, k = width, EXPANSION * width, design.kernel_size
    result = wide if design.block == "bottleneck" else narrow
    same = stride == 1 and channels == result
    if design.layer_norm and same:  # this is ConvNeXt's block, without gamma
        return FusedConvNeXtBlock(width, layer_scale_init_value=0.0, kernel_size=k, backend=backend)
    widths, kernels = {  # channels between the convolutions, and sides of their kernels
        "bottleneck": ((channels, narrow, narrow, wide), (1, k, 1)),
        "inverted": ((channels, wide, wide, narrow), (1, k, 1)),
        "moved up": ((channels, channels, wide, narrow), (k, 1, 1)),
    }[design.block]
    branch: list[nn.Module] = []
    for i, kernel in enumerate(kernels):
        # With one norm, it is after the depthwise convolution; with one activation, it is after the first 1x1.
        norm = i == 0 or not design.fewer_norms
        act = i == 1 or (i == 0 and not design.fewer_activations)
        branch.append(_conv(design, *widths[i : i + 2], 1 if kernel == 1 else stride, kernel, norm, backend))
        branch += [_norm(design, widths[i + 1], backend)] if norm else []
        branch += [_activation(design)] if act else []
    shortcut: nn.Module = nn.Identity()
    if not same:
        shortcut = nn.Conv2d(channels, result, 1, stride, bias=design.fewer_norms)
        if not design.fewer_norms:
            shortcut = nn.Sequential(shortcut, _norm(design, result, backend))
    last = nn.Identity() if design.fewer_activations else _activation(design)
    return _Residual(nn.Sequential(*branch), shortcut, last)


def _initialise(module: nn.Module) -> None:
    """He's normal initialisation for the convolutions (arXiv 1502.01852), as in ResNets."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
