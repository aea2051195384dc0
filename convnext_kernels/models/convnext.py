"""The ConvNeXt networks: V1 and isotropic (arXiv 2201.03545), V2 (arXiv 2301.00808), from this package's modules.

Parameters have the names and shapes of the official repositories (facebookresearch/ConvNeXt, ConvNeXt-V2), so their
files load without changes; `load_weights` also reads those of other libraries.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from convnext_kernels.nn import FusedConvNeXtBlock, FusedSequential, LayerNorm2d, PatchDownsample2d
from convnext_kernels.nn.layers import WideningConv2d
from convnext_kernels.ops import checks

EPS = 1e-6  # of every LayerNorm


@dataclass(frozen=True)
class Feature:
    """A map that a model with ``features_only`` returns."""

    channels: int
    stride: int  # side of the image over side of the map


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    return value


def _integers(name: str, values: object, least: int) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{name}: expected a sequence of integers, got {values!r}")
    return tuple(_integer(f"{name}[{i}]", value, least) for i, value in enumerate(values))


class _Network(nn.Module):
    """Common parts of the hierarchical and the isotropic networks: blocks' drop path, weight initialisation, head."""

    def _blocks(
        self, dims: Sequence[int], depths: Sequence[int], drop_path_rate: float, block: Callable[..., nn.Module]
    ) -> list[nn.Sequential]:
        """Stages of blocks; stochastic depth grows linearly from 0 at the first block to its rate at the last."""
        if not (isinstance(drop_path_rate, (int, float)) and math.isfinite(drop_path_rate) and 0 <= drop_path_rate < 1):
            raise ValueError(
                f"drop_path_rate: expected a number from 0 up to but not including 1, got {drop_path_rate!r}"
            )
        count = sum(depths)
        rates = iter(drop_path_rate * i / max(count - 1, 1) for i in range(count))
        return [
            FusedSequential(*(block(dim, rate) for rate in itertools.islice(rates, depth)))
            for dim, depth in zip(dims, depths, strict=True)
        ]

    def _add_head(self, channels: int, num_classes: int, global_pool: str, drop_rate: float, scale: float) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool: expected 'avg' or '' (none), got {global_pool!r}")
        self.global_pool = global_pool
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.drop = nn.Dropout(drop_rate)
        self.reset_head(num_classes, scale)

    def reset_head(self, num_classes: int, head_init_scale: float = 1.0) -> None:
        """Replace the classifier by a newly initialised one; no classifier for `num_classes` 0."""
        self.num_classes = _integer("num_classes", num_classes, 0)
        like = self.norm.weight
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(like.numel(), num_classes, device=like.device, dtype=like.dtype)
            _initialise(self.head)
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> the last map (N, C, H', W'), before the last norm."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (N, C, H', W') -> pooled, normalised features (N, C), then, unless `pre_logits`, logits.

        Without pooling (``global_pool=""``) the LayerNorm and the classifier run on every pixel, and the result is
        (N, C or classes, H', W').
        """
        x = x.mean((-2, -1)) if self.global_pool else x.permute(0, 2, 3, 1)
        x = self.norm(x)
        if not pre_logits:
            x = self.head(self.drop(x))
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def _check_images(self, x: Tensor, side: int) -> None:
        if torch.jit.is_tracing() or isinstance(x, Proxy):
            return  # without values
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.in_chans or min(x.shape[2:]) < side:
            raise ValueError(
                f"x: expected images (N, {self.in_chans}, H, W) of at least {side}x{side}, got {tuple(x.shape)}"
            )


def _initialise(module: nn.Module) -> None:
    """Truncated normal with standard deviation 0.02 and zero biases (arXiv 2201.03545, appendix A.1)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNeXt(_Network):
    """A hierarchical ConvNeXt: 4x4 stem, stages of blocks, downsampling by 2 between them.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for none.
        use_grn: V2 blocks.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_scale_init_value: initial value of the V1 blocks' ``gamma``; 0 for blocks without.
        kernel_size: side of the depthwise kernels.
        global_pool: "avg", or "" for a classifier on every pixel of the last map.
        drop_rate: dropout before the classifier.
        head_init_scale: factor on the classifier's initial weights.
        features_only: return the maps of the stages instead of logits; the model has no head then.
        out_indices: stages whose maps are returned, in this order; negative ones count from the last; None for all.
        feature_norm: normalise each of these maps by its own LayerNorm (``norm0`` to ``norm3``), as the official
            backbones for detection and segmentation do.
        memory: what training keeps of every block, see `FusedConvNeXtBlock`.
        backend: of every block and layer; "auto" or a name of `convnext_kernels.list_backends()`.

    Input is (N, in_chans, H, W). Height and width are at least 4, doubled for every further stage (32 for four
    stages). If they are not divisible, the right and the bottom are cropped, as in strided convolutions.
    channels_last is the fast memory format. The result is (N, num_classes), or a list of maps with ``features_only``.

    Raises TypeError or ValueError for arguments out of these ranges and images of another shape.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        kernel_size: int = 7,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head_init_scale: float = 1.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        feature_norm: bool = False,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.depths, self.dims = _integers("depths", depths, 0), _integers("dims", dims, 1)
        if len(self.depths) != len(self.dims):
            raise ValueError(f"dims: expected one for each of the {len(self.depths)} stages, got {len(self.dims)}")
        self.in_chans, self.use_grn = _integer("in_chans", in_chans, 1), use_grn
        convolution = WideningConv2d if checks.widens() else nn.Conv2d
        stem = nn.Sequential(
            convolution(in_chans, self.dims[0], kernel_size=4, stride=4),
            LayerNorm2d(self.dims[0], EPS, backend=backend),
        )
        between = (PatchDownsample2d(a, b, eps=EPS, backend=backend) for a, b in itertools.pairwise(self.dims))
        self.downsample_layers = nn.ModuleList([stem, *between])
        block = partial(
            FusedConvNeXtBlock,
            layer_scale_init_value=layer_scale_init_value,
            use_grn=use_grn,
            kernel_size=kernel_size,
            memory=memory,
            backend=backend,
        )
        self.stages = nn.ModuleList(self._blocks(self.dims, self.depths, drop_path_rate, block))
        self.apply(_initialise)
        self.features_only, self.out_indices, self.feature_norm = features_only, (), feature_norm
        if features_only:
            self.num_classes = 0
            self.out_indices = self._stage_indices(range(len(self.dims)) if out_indices is None else out_indices)
            for i in self.out_indices if feature_norm else ():
                self.add_module(f"norm{i}", LayerNorm2d(self.dims[i], EPS, backend=backend))
            del self.downsample_layers[max(self.out_indices) + 1 :], self.stages[max(self.out_indices) + 1 :]
        else:
            for name, given in (("feature_norm", feature_norm), ("out_indices", out_indices is not None)):
                if given:
                    raise ValueError(f"{name}: needs features_only=True")
            self._add_head(self.dims[-1], num_classes, global_pool, drop_rate, head_init_scale)

    def _stage_indices(self, indices: Sequence[int]) -> tuple[int, ...]:
        count = len(self.dims)
        found = tuple(i + count if i < 0 else i for i in (_integers("out_indices", indices, -count)))
        if len(set(found)) != len(found) or max(found) >= count:
            raise ValueError(f"out_indices: expected different integers below {count}, got {tuple(indices)}")
        return found

    @property
    def feature_info(self) -> tuple[Feature, ...]:
        """Channels and stride of each map in `out_indices`; of all stages for a classifier."""
        indices = self.out_indices or range(len(self.dims))
        return tuple(Feature(self.dims[i], 4 * 2**i) for i in indices)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Images (N, in_chans, H, W) -> the map of every stage, (N, dims[i], H // 4 // 2**i, W // 4 // 2**i)."""
        self._check_images(x, 4 * 2 ** (len(self.stages) - 1))
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> the last map (N, C, H', W'), before the last norm."""
        return self.forward_stages(x)[-1]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (N, in_chans, H, W) -> logits (N, num_classes), or the maps in `out_indices`."""
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        maps = self.forward_stages(x)
        return [getattr(self, f"norm{i}")(maps[i]) if self.feature_norm else maps[i] for i in self.out_indices]


class IsotropicConvNeXt(_Network):
    """An isotropic ConvNeXt: 16x16 patches, then blocks of one width at one resolution (arXiv 2201.03545, 3.3).

    Arguments are those of `ConvNeXt`, with one depth and one width. By default the blocks have no ``gamma``.
    Height and width of the images are at least 16.
    """

    def __init__(
        self,
        depth: int = 18,
        dim: int = 384,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        kernel_size: int = 7,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head_init_scale: float = 1.0,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.depths, self.dims = (_integer("depth", depth, 0),), (_integer("dim", dim, 1),)
        self.in_chans, self.use_grn = _integer("in_chans", in_chans, 1), False
        self.stem = nn.Conv2d(in_chans, dim, kernel_size=16, stride=16)
        block = partial(
            FusedConvNeXtBlock,
            layer_scale_init_value=layer_scale_init_value,
            kernel_size=kernel_size,
            memory=memory,
            backend=backend,
        )
        (self.blocks,) = self._blocks(self.dims, self.depths, drop_path_rate, block)
        self.apply(_initialise)
        self._add_head(dim, num_classes, global_pool, drop_rate, head_init_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> (N, dim, H // 16, W // 16), before the last norm."""
        self._check_images(x, 16)
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


_V2 = {"use_grn": True}
# name -> (class, depths, dims, options): arXiv 2201.03545, section 3 and table 2 (V1); 2301.00808, appendix A.1 (V2)
_FAMILY: dict[str, tuple[type[_Network], dict[str, object]]] = {
    "convnext_tiny": (ConvNeXt, {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}),
    "convnext_small": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}),
    "convnext_base": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}),
    "convnext_large": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}),
    "convnext_xlarge": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)}),
    "convnext_isotropic_small": (IsotropicConvNeXt, {"depth": 18, "dim": 384}),
    "convnext_isotropic_base": (IsotropicConvNeXt, {"depth": 18, "dim": 768}),
    "convnext_isotropic_large": (IsotropicConvNeXt, {"depth": 36, "dim": 1024}),
    "convnextv2_atto": (ConvNeXt, {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), **_V2}),
    "convnextv2_femto": (ConvNeXt, {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384), **_V2}),
    "convnextv2_pico": (ConvNeXt, {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), **_V2}),
    "convnextv2_nano": (ConvNeXt, {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), **_V2}),
    "convnextv2_tiny": (ConvNeXt, {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768), **_V2}),
    "convnextv2_base": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), **_V2}),
    "convnextv2_large": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536), **_V2}),
    "convnextv2_huge": (ConvNeXt, {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816), **_V2}),
}


def near(name: object, known: Sequence[str]) -> str:
    """Return the names of `known` that `name` may have meant, as the end of an error message."""
    close = difflib.get_close_matches(str(name).lower(), known, n=3) or known
    return f"{'close' if len(close) < len(known) else 'known'}: {', '.join(close)}"


def list_models() -> list[str]:
    """Return the names that `create_model` accepts."""
    return list(_FAMILY)


def create_model(name: str, **options: object) -> ConvNeXt | IsotropicConvNeXt:
    """Build a model of the papers by its name, randomly initialised; `options` are keywords of its class.

    Raises ValueError for an unknown name, with similar ones, and what the class raises.
    """
    if name not in _FAMILY:
        raise ValueError(f"name: unknown model {name!r}; {near(name, list_models())}")
    kind, design = _FAMILY[name]
    return kind(**{**design, **options})


def _named(name: str) -> Callable[..., ConvNeXt | IsotropicConvNeXt]:
    def build(**options: object) -> ConvNeXt | IsotropicConvNeXt:
        return create_model(name, **options)

    kind, design = _FAMILY[name]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`{kind.__name__}` with {', '.join(f'{k}={v}' for k, v in design.items())}; see `create_model`."
    return build


convnext_tiny = _named("convnext_tiny")
convnext_small = _named("convnext_small")
convnext_base = _named("convnext_base")
convnext_large = _named("convnext_large")
convnext_xlarge = _named("convnext_xlarge")
convnext_isotropic_small = _named("convnext_isotropic_small")
convnext_isotropic_base = _named("convnext_isotropic_base")
convnext_isotropic_large = _named("convnext_isotropic_large")
convnextv2_atto = _named("convnextv2_atto")
convnextv2_femto = _named("convnextv2_femto")
convnextv2_pico = _named("convnextv2_pico")
convnextv2_nano = _named("convnextv2_nano")
convnextv2_tiny = _named("convnextv2_tiny")
convnextv2_base = _named("convnextv2_base")
convnextv2_large = _named("convnextv2_large")
convnextv2_huge = _named("convnextv2_huge")
