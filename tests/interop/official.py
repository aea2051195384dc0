"""Modules with the structure of the authors' code, in this file's own words: names, shapes, layouts and formulas.

ConvNeXt's block and model, Vocos' and F5-TTS' blocks over time, MedNeXt's of volumes.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath  # the official code takes it from timm too
from torch import nn


class LayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.data_format = data_format
        self.normalized_shape = (normalized_shape,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        if x.dim() == 5:
            x = x.movedim(1, -1)
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)
        centred = x - x.mean(1, keepdim=True)
        normalized = centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight.view(-1, 1, 1) * normalized + self.bias.view(-1, 1, 1)


class GRN(nn.Module):
    def __init__(self, dim, axes=2):
        super().__init__()
        self.axes = tuple(range(1, axes + 1))
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, *[1] * axes, dim)) for _ in range(2))

    def forward(self, x):
        response = torch.linalg.vector_norm(x, dim=self.axes, keepdim=True)
        return self.gamma * (x * (response / (response.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class Block(nn.Module):
    def __init__(self, dim, drop_path=0.0, layer_scale_init_value=1e-6, use_grn=False):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        if use_grn:
            self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        if not use_grn:
            has_gamma = layer_scale_init_value > 0
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if has_gamma else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x):
        y = self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        if hasattr(self, "grn"):
            y = self.grn(y)
        y = self.pwconv2(y)
        if getattr(self, "gamma", None) is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    def __init__(self, dims=(8, 16), depths=(2, 2), drop_path_rate=0.0, use_grn=False, num_classes=10):
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, dims[0], kernel_size=4, stride=4), LayerNorm(dims[0], data_format="channels_first")
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(
                    LayerNorm(before, data_format="channels_first"), nn.Conv2d(before, after, kernel_size=2, stride=2)
                )
            )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, drop_path_rate, use_grn=use_grn) for _ in range(depth)))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean([-2, -1])))


class AdaLayerNorm(nn.Module):
    def __init__(self, count, dim):
        super().__init__()
        self.eps, self.dim = 1e-6, dim
        self.scale, self.shift = nn.Embedding(count, dim), nn.Embedding(count, dim)

    def forward(self, x, cond_embedding_id):
        y = F.layer_norm(x, (self.dim,), eps=self.eps)
        return y * self.scale(cond_embedding_id) + self.shift(cond_embedding_id)


class ConvNeXtBlock(nn.Module):
    """Vocos': (N, C, L)."""

    def __init__(self, dim, hidden, layer_scale=0.5, count=None):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = AdaLayerNorm(count, dim) if count else nn.LayerNorm(dim, eps=1e-6)
        self.adanorm = count is not None
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None

    def forward(self, x, cond_embedding_id=None):
        y = self.dwconv(x).transpose(1, 2)
        if self.adanorm:
            assert cond_embedding_id is not None
            y = self.norm(y, cond_embedding_id)
        else:
            y = self.norm(y)
        y = self.pwconv2(self.act(self.pwconv1(y)))
        return x + (y if self.gamma is None else self.gamma * y).transpose(1, 2)


class ConvNeXtV2Block(nn.Module):
    """F5-TTS': (N, L, C)."""

    def __init__(self, dim, hidden, dilation=1):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3 * dilation, dilation=dilation, groups=dim)
        self.norm, self.grn = nn.LayerNorm(dim, eps=1e-6), GRN(hidden, axes=1)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        y = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.pwconv2(self.grn(self.act(self.pwconv1(y))))


class MedNeXtBlock(nn.Module):
    """Of arXiv 2303.09975, with the names of the authors' code; to halve and to double a volume too."""

    def __init__(self, channels, out, kernel=3, ratio=2, conv=nn.Conv3d, stride=1, grn=False, norm=None, act=nn.GELU):
        super().__init__()
        flat = nn.Conv2d if conv is nn.Conv2d else nn.Conv3d
        self.conv1 = conv(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.norm = norm or nn.GroupNorm(channels, channels)
        self.conv2 = flat(channels, ratio * channels, 1)
        self.act = act()
        self.conv3 = flat(ratio * channels, out, 1)
        self.do_res = stride == 1
        if grn:
            shape = (1, ratio * channels, *[1] * len(self.conv1.kernel_size))
            self.grn_gamma, self.grn_beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        y = self.act(self.conv2(self.norm(self.conv1(x))))
        if hasattr(self, "grn_gamma"):
            energy = torch.linalg.vector_norm(y, dim=tuple(range(2, y.dim())), keepdim=True)
            y = self.grn_gamma * (y * (energy / (energy.mean(1, keepdim=True) + 1e-6))) + self.grn_beta + y
        y = self.conv3(y)
        return x + y if self.do_res else y
