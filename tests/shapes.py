"""The table of shapes and dtypes that the parity tests run over; every row says what it is there for.

Sizes stand below, at, at a multiple of, and above the vectors and tiles of the kernels: 16 floats in a vector,
16 x 32 in an AMX tile, panels of 48 columns, 14 pixels in registers.

The product of rows, dtypes, kernels and directions is the extended tests (``pytest -m extended``). What every run of
the tests takes is chosen from it by a rule that stands beside each test, `everyday`: all pairs of factors, and the
edges of vectors and tiles on every kernel in fp32 and bf16.
"""

import functools
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch

from convnext_kernels.spec import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ("portable", "neon_bf16") if _ARM else ("portable", "avx2", "avx512", "avx512bf16", "amx")
# What the fixture `kernel` goes through, on every such machine in the same order: a backend and its instruction set.
Kernel = tuple[str, str | None]
EAGER, TRITON, CUDA = ("eager", None), ("triton", None), ("cuda", None)
KERNELS: tuple[Kernel, ...] = (EAGER, *(("cpu", isa) for isa in ISAS), TRITON, CUDA)

CONVOLVED, CONVOLVE, BOTTLENECK, VOLUMES = ("dwconv",), ("dwconv", "block"), ("mlp", "block"), ("dwconv3d",)
IMAGES = tuple(op for op in OPS if op not in VOLUMES)
NORMED = ("layernorm", "downsample", *BOTTLENECK)


@dataclass(frozen=True)
class Case:
    """One configuration of the block; each op reads the fields that concern it."""

    reason: str
    n: int = 2
    c: int = 16
    h: int = 7
    w: int = 5
    d: int = 3  # planes of a volume, which images have not
    k: int | tuple[int, ...] = 7  # side of the depthwise kernel, or its (depth,) height and width
    dilation: int | tuple[int, int] = 1
    stride: int = 1
    ratio: int = 4
    variant: str = "v1"  # "v1": gamma; "v2": GRN; "plain": neither
    bias: bool = True
    norm: str = "layer"
    activation: str = "gelu"
    drop: bool = False  # drop-path factors: sample 0 dropped, the others scaled up
    patch: int = 2  # side of the downsampling patches
    ops: tuple[str, ...] = IMAGES  # those it is there for; for the others it is one more size, and extended
    edge: bool = False  # at or beside the edge of a vector or tile: always tested in fp32 and in bf16, on every kernel
    costly: bool = False  # in Triton's interpreter, which takes seconds for it
    half: bool = False  # the row that is always tested in fp16, which runs what bf16 runs with another element type

    def __str__(self) -> str:
        flags = ("" if self.bias else "-nobias") + ("-drop" if self.drop else "")
        k, d = (of if isinstance(of, int) else "x".join(map(str, of)) for of in (self.k, self.dilation))
        depth = f"{self.d}x" if self.ops == VOLUMES else ""
        strided = f"s{self.stride}" if self.stride > 1 else ""
        flags += "".join(f"-{name}" for name in (self.norm, self.activation) if name not in ("layer", "gelu"))
        size = f"n{self.n}-c{self.c}-{depth}{self.h}x{self.w}"
        return f"{size}-k{k}d{d}{strided}-r{self.ratio}-{self.variant}-p{self.patch}{flags}"

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the depthwise kernel."""
        return (self.k, self.k) if isinstance(self.k, int) else self.k

    def serves(self, op: str) -> bool:
        """Whether it is a row of `op`: the block has stride 1; rectangles, norms and activations say nothing new to ops
        without them.
        """
        if VOLUMES in ((op,), self.ops):
            return (op,) == self.ops
        variants = BOTTLENECK if self.norm == "layer" else NORMED
        if (self.norm, self.activation) != ("layer", "gelu") and op not in variants:
            return False
        square = isinstance(self.k, int) and isinstance(self.dilation, int)
        return op == "dwconv" or (self.stride == 1 and (square or op == "block"))


# Few, and each of them an edge. CUDA has no kernel for them (tests/backends/test_promises.py).
_volume = functools.partial(Case, c=17, d=5, h=4, w=6, k=3, ops=VOLUMES, edge=True)

CASES = (
    Case("one vector of channels, odd sizes", edge=True),
    # channels
    Case("one channel: LayerNorm gives its bias, depthwise is a plain convolution", c=1),
    Case("channels far below a vector", c=3, variant="v2"),
    Case("one channel short of a vector", c=15, variant="v2", edge=True),
    Case("one channel more than a vector", c=17, edge=True, half=True),
    Case("vectors and a half", c=40, n=3, variant="v2", edge=True),
    Case("one panel of columns", c=48, h=5, w=15, edge=True),
    Case("ConvNeXt-T's first width, whole tiles", c=96, h=14, w=14, edge=True, costly=True),
    Case("ConvNeXt V2's first widths: whole vectors, not whole panels", c=80, h=7, w=14, variant="v2", costly=True),
    Case("whole vectors and a tail", c=100, h=5, w=7, edge=True),
    Case("beyond 128 with a tail of two", c=130, n=1, variant="v2", costly=True),
    Case("more channels than pixels: the hidden may be split between threads", c=384, n=1, h=7, w=7, k=3),
    # height and width
    Case("one pixel: every tap but one is padding", h=1, w=1, patch=1),
    Case("one pixel in V2: the spatial norm is an absolute value", h=1, w=1, variant="v2", patch=1),
    Case("one column", h=14, w=1, patch=1),
    Case("one row", h=1, w=14, n=3, patch=1),
    Case("one pixel short of a register tile; patches leave a rest in H", h=13, w=14, patch=4, edge=True),
    Case("a register tile and one pixel; patches leave a rest in W", h=14, w=15, edge=True, costly=True),
    Case("not square, several row blocks and a rest", h=33, w=57, c=24, n=1, ratio=2, edge=True),
    Case("the same for V2: its norm runs over all of them", h=57, w=33, c=24, n=1, ratio=2, variant="v2", costly=True),
    # batch
    Case("batch of an odd size, more samples than threads", n=5, c=24),
    # kernel sizes and dilations
    Case("1x1: no neighbours at all", k=1, ops=CONVOLVE),
    Case("smallest real kernel", k=3, h=14, w=13, ops=CONVOLVE),
    Case("9x9, wider than the image", k=9, ops=CONVOLVE),
    Case("11x11", k=11, h=15, w=13, costly=True, ops=CONVOLVE),
    Case("13x13, SLaK and RepLKNet", k=13, h=14, w=15, costly=True, ops=CONVOLVE),
    Case("31x31, the largest: most taps fall outside", k=31, h=13, w=14, costly=True, ops=CONVOLVE),
    # 17 channels: oneDNN's 16-bit depthwise never returns for 31x31 on such an image with 16 or fewer (torch 2.14).
    Case("31x31 on an image larger than the kernel", k=31, h=33, w=40, c=17, n=1, costly=True, ops=CONVOLVE),
    Case("dilation 2", dilation=2, h=14, w=15, ops=CONVOLVE),
    Case("dilation 3: reaches beyond the image on both sides", dilation=3, h=7, w=5, ops=CONVOLVE),
    # rectangles: InceptionNeXt, SegNeXt, SLaK
    Case("1x11: one row of taps, no neighbours above", k=(1, 11), c=18, h=7, w=15, ops=CONVOLVE, edge=True),
    Case("11x1: one column of taps, no neighbours beside", k=(11, 1), c=34, h=15, w=7, ops=CONVOLVE, edge=True),
    Case("21x1, taller than two register tiles", k=(21, 1), h=33, w=3, c=24, n=1, ops=CONVOLVED),
    Case("51x5: the largest side, taller than the image", k=(51, 5), h=29, w=15, n=1, costly=True, ops=CONVOLVED),
    # 17 channels: with 16 or fewer oneDNN's 16-bit depthwise never returns for 1x51 and 5x51 either (channels_last).
    Case("5x51: more taps than bits beside a tile", k=(5, 51), h=13, w=64, n=1, c=17, costly=True, ops=CONVOLVED),
    Case("51x51: the largest kernel", k=51, h=15, w=29, c=17, n=1, costly=True, ops=CONVOLVED),
    Case("dilations 2 and 3: lattices of different sizes", k=(3, 5), dilation=(2, 3), h=14, w=15, ops=CONVOLVE),
    # stride
    Case("stride 2, even sizes: the last row is no centre", k=7, stride=2, h=14, w=14, ops=CONVOLVED, edge=True),
    Case("stride 2, odd sizes: the last row and column are centres", k=3, stride=2, c=17, ops=CONVOLVED),
    Case("stride 2, dilation 2: half of dx has no tap", k=3, stride=2, dilation=(1, 2), h=9, w=14, ops=CONVOLVED),
    Case("stride 2 of a row of taps, more than two tiles wide", k=(1, 13), stride=2, h=4, w=63, n=1, ops=CONVOLVED),
    # the bottleneck
    Case("hidden as wide as the input", ratio=1, ops=BOTTLENECK),
    Case("ratio 2", ratio=2, c=17, variant="v2", edge=True, half=True, ops=BOTTLENECK),
    Case("ratio 3, hidden not a power of two", ratio=3, c=40, ops=BOTTLENECK),
    Case("neither gamma nor GRN", variant="plain", ops=BOTTLENECK),
    Case("no biases (every Conv and Linear has bias=False)", bias=False),
    Case("no biases in V2", bias=False, variant="v2", c=17, ops=BOTTLENECK),
    Case("drop path", drop=True, n=5, ops=BOTTLENECK),
    Case("drop path in V2", drop=True, n=3, variant="v2", ops=BOTTLENECK),
    # norms and activations: each once in V1 or V2, the norms in both
    Case("RMSNorm and tanh GELU: timm's convnext_atto_rms", norm="rms", activation="gelu_tanh", c=40, ops=NORMED),
    Case("RMSNorm in V2, Hardswish", norm="rms", activation="hardswish", variant="v2", c=17, ops=BOTTLENECK),
    Case("SimpleNorm: timm's convnext_zepto_rms; SiLU", norm="simple", activation="silu", c=17, ops=NORMED),
    Case("SimpleNorm in V2, few channels, ReLU", norm="simple", activation="relu", variant="v2", c=3, ops=BOTTLENECK),
    Case("another activation under LayerNorm", activation="mish", c=17, ops=BOTTLENECK),
    Case("another activation under LayerNorm in V2", activation="quick_gelu", variant="v2", ops=BOTTLENECK),
    Case(
        "dropped samples, ReLU6",
        norm="rms",
        activation="relu6",
        variant="plain",
        bias=False,
        drop=True,
        n=3,
        ops=BOTTLENECK,
    ),
    # volumes
    _volume("one channel more than a vector, batch 2", half=True),
    _volume("one channel, no bias", c=1, bias=False),
    _volume("D, H and W smaller than K", n=1, c=3, d=2, h=1, w=3, k=7),
    _volume("one voxel", n=1, d=1, h=1, w=1, k=5),
    _volume("K 5, wider than a register tile", n=1, c=33, d=4, h=5, w=15, k=5, costly=True),
    _volume("K 7, whole vectors", n=1, c=32, d=8, h=7, w=9, k=7, costly=True),
    _volume("three different sides", n=1, d=3, k=(3, 5, 7)),
    _volume("a column of depth, which is along no row", k=(5, 1, 1)),
    _volume("kernels of one column", n=1, k=(3, 5, 1), h=7, w=3),
    _volume("one kernel plane: images after one another", k=(1, 3, 3)),
    _volume("stride 2, odd sizes: the last plane is a centre", stride=2, h=7, w=5),
    _volume("stride 2, even sizes, K 5", stride=2, c=16, d=4, h=6, w=8, k=5, costly=True),
    _volume("more planes than the weight gradient takes at once", n=1, c=8, d=14, h=2, w=3, costly=True),
    _volume("too wide for the CPU to hold all planes of its dw", n=1, c=3, d=2, h=5, w=300, k=(7, 3, 5), costly=True),
    _volume("more rows than a band of the CPU's forward pass", n=1, c=64, d=2, h=40, w=17, costly=True),
)

_RELEVANT = {
    "dwconv": ("n", "c", "h", "w", "k", "dilation", "stride", "bias"),
    "dwconv3d": ("n", "c", "d", "h", "w", "k", "stride", "bias"),
    "layernorm": ("n", "c", "h", "w", "norm"),
    "grn": ("n", "c", "h", "w"),
    "mlp": ("n", "c", "h", "w", "ratio", "variant", "bias", "drop", "norm", "activation"),
    "block": ("n", "c", "h", "w", "k", "dilation", "ratio", "variant", "bias", "drop", "norm", "activation"),
    "downsample": ("n", "c", "h", "w", "patch", "bias", "norm"),
}


def _distinct(op: str, named: Iterable[tuple[str, Case]]) -> list[tuple[str, Case]]:
    unique: dict[tuple, tuple[str, Case]] = {}
    for name, case in named:
        if not case.serves(op):
            continue
        unique.setdefault(tuple(getattr(case, field) for field in _RELEVANT[op]), (name, case))
    return list(unique.values())


@functools.cache
def cases(op: str) -> list[Case]:
    """Rows of the table that differ in what `op` reads."""
    return [case for _, case in _distinct(op, ((str(case), case) for case in CASES))]


def always(op: str, case: Case, dtype: torch.dtype, kernel: Kernel, direction: int) -> bool:
    """Whether every run of the tests has this part of the table: rows x dtypes x kernels x directions (0 or 1).

    A row runs on each kernel in both directions, in fp32 one way and in bf16 the other, which alternate from row to
    row and from kernel to kernel; rows at an edge run in both. Instruction sets for bf16 products take bf16 both ways.
    Triton's interpreter takes seconds where the others take milliseconds: there rows at an edge alternate too, `costly`
    ones do not run, and of the block, which launches what dwconv and mlp launch, only small images at an edge do. There
    and on eager, which is PyTorch's, other rows run in one direction only.
    """
    small, index = (case.h, case.w) == (7, 5), cases(op).index(case)
    if op not in case.ops or (op in VOLUMES and kernel == CUDA):
        return False
    if kernel == TRITON and (case.costly or (op == "block" and not (small and case.edge))):
        return False
    if dtype == torch.float16:
        return case.half and (op, kernel) != ("block", TRITON)
    if case.edge and kernel not in (EAGER, TRITON):
        return True
    if kernel[1] in ("avx512bf16", "amx", "neon_bf16"):
        return dtype == torch.bfloat16
    if not case.edge and kernel in (EAGER, TRITON):
        return (direction, DTYPES.index(dtype)) == (index % 2, index // 2 % 2)
    return DTYPES.index(dtype) == (index + KERNELS.index(kernel) + direction) % 2


def chosen(everyday: Callable[..., bool]) -> pytest.MarkDecorator:
    """Of a test's parameters, those that `everyday` says yes to; the others get the mark `extended`.

    `everyday` is called with the parameters that it names.
    """
    return pytest.mark.chosen.with_args(everyday)


def rows(ops: Iterable[str], named: dict[str, Case]) -> list:
    """Parameters (op, name) for those of a test's own few cases that differ in what the op reads."""
    return [pytest.param(op, name, id=f"{op}-{name}") for op in ops for name, _ in _distinct(op, named.items())]
