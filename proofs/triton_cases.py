"""Calls that reach every kernel of the Triton backend.

The static report compiles COMPILED: each row reaches a configuration that no other row reaches; more channels alone are
not added.
Tensors are on "meta": the cases call the backend's own launchers, which then allocate no memory.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from convnext_kernels import tuning
from convnext_kernels.bench.candidates import tf32
from convnext_kernels.calls import BlockCall, DownsampleCall, Dwconv3dCall, DwconvCall, MlpCall, NormCall
from convnext_kernels.spec import MlpParameters
from convnext_kernels.tuning.pick import predicted

TRITON = "convnext_kernels.backends.triton"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    c: int
    size: int  # height and width, and depth of a volume
    n: int = 8
    dtype: str = "bf16"
    backward: bool = False
    k: int = 7  # depthwise kernel, or side of a downsampling patch
    sides: tuple[int, int] | None = None  # of a depthwise kernel that is no square
    layout: str = "nhwc"
    grn: bool = False
    norm: str = "layer"
    adaptive: bool = False  # each sample has a weight and a bias of LayerNorm; forward only
    activation: str = "gelu"
    keeps: bool = False  # the hidden is kept for the gradient, as with memory="balanced"
    autocast: bool = False  # an fp32 x with bf16 matmuls, of the op block
    tf32: bool = False  # allowed in matmuls of fp32
    plan: str = ""  # a part of its name: the cost model chooses among those that have it
    quick: bool = False  # compiled by every CI run

    def __str__(self) -> str:
        parts = [self.op, f"C{self.c}", f"{self.size}x{self.size}", f"N{self.n}", self.dtype]
        side = self.k if self.sides is None else f"{self.sides[0]}x{self.sides[1]}"
        parts += [f"k{side}"] if self.op in ("dwconv", "dwconv3d", "block", "downsample") else []
        parts += ["nchw"] if self.layout == "nchw" else []
        parts += ["v2"] if self.grn else []
        parts += [self.plan] if self.plan else []
        parts += ["balanced"] if self.keeps else []
        parts += ["autocast"] if self.autocast else []
        parts += ["tf32"] if self.tf32 else []
        parts += ["adaptive"] if self.adaptive else []
        parts += [name for name in (self.norm, self.activation) if name not in ("layer", "gelu")]
        return " ".join([*parts, "backward" if self.backward else "forward"])


def _both(case: Case) -> Iterator[Case]:
    yield case
    yield Case(**{**vars(case), "backward": True})


def _compiled() -> Iterator[Case]:
    for parts in (8, 128):  # partial sums: flat tiles and tall ones
        yield Case("reduce", 96, 7, parts, quick=True)
    yield Case("weights", 96, 7, quick=True)
    for c, size, n in ((96, 56, 8), (384, 14, 8), (768, 7, 8), (192, 28, 128)):
        yield from _both(Case("dwconv", c, size, n, quick=c in (96, 768)))
    yield Case("dwconv", 768, 7, 128)  # whole planes
    for c, size, n in ((96, 56, 8), (192, 28, 8), (384, 14, 8), (384, 14, 128), (768, 7, 128)):
        yield from _both(Case("mlp", c, size, n, quick=n == 8 and c != 192))
    for c, size in ((96, 56), (384, 14)):
        yield from _both(Case("mlp", c, size, grn=True, quick=c == 384))
    yield from _both(Case("mlp", 256, 28))  # the widest fused one
    yield from _both(Case("mlp", 384, 14, keeps=True))
    yield from _both(Case("mlp", 384, 14, keeps=True, grn=True))
    yield from _both(Case("mlp", 96, 56, dtype="fp32", quick=True))  # plan "cublas"
    yield from _both(Case("mlp", 384, 14, dtype="fp32", grn=True))
    for c, size, keeps in ((96, 56, False), (128, 28, True), (192, 28, False), (384, 14, False)):
        yield from _both(Case("mlp", c, size, dtype="fp32", keeps=keeps, tf32=True))
    for plan in ("64x64-k32", "128x64-k32", "128x128-k32"):  # of both products, and of the gradients that have it
        yield from _both(Case("mlp", 384, 14, dtype="fp32", tf32=True, plan=plan))
    yield from _both(Case("mlp", 384, 14, dtype="fp32", grn=True, tf32=True))
    yield from _both(Case("mlp", 96, 56, dtype="fp16"))
    for c, size in ((96, 56), (128, 28), (192, 28), (384, 14)):
        yield Case("block", c, size, autocast=True, quick=c == 96)
        yield Case("block", c, size, autocast=True, backward=True)  # 44 s for one architecture: not in every CI run
    yield from _both(Case("block", 96, 56, autocast=True, keeps=True))
    yield from _both(Case("block", 96, 56, autocast=True, grn=True))
    # the bottleneck's gradients in all their plans, of which the cases above have those that the cost model chooses
    for plan, channels in (("gemm", (96, 192)), ("fused", (96, 128, 192)), ("recomputed", (96, 128))):
        for c in channels:
            yield Case("mlp", c, 28, backward=True, plan=plan, quick=c == 96)
            yield Case("block", c, 28, backward=True, autocast=True, plan=plan)
        yield Case("mlp", 96, 56, backward=True, norm="simple", activation="mish", plan=plan)
    for plan in ("gemm", "fused"):
        yield Case("mlp", 96, 28, backward=True, grn=True, plan=plan)
        yield Case("block", 96, 56, backward=True, autocast=True, grn=True, plan=plan)
    yield Case("mlp", 192, 28, backward=True, grn=True, plan="fused")
    for plan in ("s4-tma", "s3-g8-tma", "tma-ws"):  # from sm_90 on
        yield Case("mlp", 384, 14, plan=plan)
        yield Case("mlp", 384, 14, grn=True, plan=plan)
        yield Case("block", 384, 14, autocast=True, plan=plan)
    for plan in ("s4-tma", "s2-tma"):
        yield Case("mlp", 384, 14, backward=True, plan=plan)
    yield Case("block", 96, 56, plan="whole", quick=True)
    yield Case("block", 40, 28, dtype="fp16", activation="mish", plan="whole")
    # the other norms, and the activation with the most instructions: in the fused kernel, in two products, in V2
    yield from _both(Case("mlp", 96, 56, norm="simple", activation="mish"))
    yield from _both(Case("mlp", 384, 14, norm="rms", activation="mish", grn=True))
    yield from _both(Case("mlp", 96, 56, norm="rms"))
    for norm in ("rms", "simple"):
        yield from _both(Case("layernorm", 96, 56, norm=norm))
    for c, plan, quick in ((96, "fused", True), (384, "gemm", True), (384, "cublas", False)):
        yield Case("mlp", c, 28, adaptive=True, plan=plan, quick=quick)
    yield Case("block", 96, 56, adaptive=True, plan="whole")
    yield Case("dwconv", 192, 28, dtype="fp16")  # widened one by one
    yield from _both(Case("dwconv", 192, 28, dtype="fp32"))
    yield from _both(Case("dwconv", 192, 28, layout="nchw"))
    for dtype, plans in (  # two channels per thread, on sm_100
        ("bf16", ("rolling-q4-s1-x2", "rows-q7-x2")),
        ("fp16", ("rolling-q4-s2-x2",)),
        ("fp32", ("rolling-q4-s4-x2",)),
    ):
        for plan in plans:
            yield Case("dwconv", 96, 28, 128, dtype, plan=plan)
    yield Case("dwconv", 384, 14, 128, "fp32", k=13, plan="rows-q7-pairs-x2")
    yield Case("dwconv", 384, 28, 128, "fp32", k=31, plan="rows-q14-pairs-x2")
    yield Case("dwconv", 384, 28, 128, k=31, plan="rows-q14-x2")
    for k in (13, 31):  # kernels with more rows than fit in registers
        yield from _both(Case("dwconv", 384, 14, k=k, plan="-q", quick=k == 13))
    yield Case("dwconv", 96, 28, 128, k=31, plan="q28-kh2", backward=True)
    for sides in ((1, 11), (21, 1)):  # pairs of channels along a row, along a column
        yield from _both(Case("dwconv", 96, 28, 128, sides=sides, plan="lines", quick=sides == (1, 11)))
    yield from _both(Case("dwconv", 96, 56, dtype="fp16", sides=(11, 1), plan="lines"))
    yield from _both(Case("dwconv", 96, 56, dtype="fp32", sides=(1, 51), plan="lines"))
    for size, k, tiles, weights in (  # on tensor cores, every width of a window
        (14, 31, ("c8-m32-r2", "c8-m16-r4"), ("r4-kh4",)),
        (28, 31, ("c8-m32-r2", "c16-m16-r2", "c8-m64-r1", "c8-m16-r4"), ("r4-kh2", "r2-kh2")),
        (56, 13, ("c8-m32-r2", "c16-m16-r2"), ("r4-kh4", "r4-kh2")),
        (56, 31, ("c8-m16-r2", "c8-m16-r4"), ("r2-kh2", "r3-kh2")),
    ):
        for plan in tiles:
            yield Case("dwconv", 96, size, 128, k=k, plan=f"toeplitz-{plan}", quick=plan == "c8-m32-r2")
        for plan in weights:
            yield Case("dwconv", 96, size, 128, k=k, plan=f"toeplitz-{plan}", quick=plan == "r3-kh2", backward=True)
    yield from _both(Case("dwconv", 96, 28, 1, "fp16", k=13, plan="toeplitz"))
    for c, size, k in ((32, 64, 3), (64, 32, 5), (128, 16, 7)):  # MedNeXt's stages
        yield from _both(Case("dwconv3d", c, size, 2, k=k, quick=k == 3))
    for c, size in ((96, 56), (768, 7)):
        yield from _both(Case("layernorm", c, size, quick=True))
    yield from _both(Case("layernorm", 768, 7, dtype="fp32"))
    yield from _both(Case("layernorm", 1536, 7, layout="nchw"))
    yield from _both(Case("grn", 384, 56, quick=True))
    yield from _both(Case("grn", 6144, 7))
    yield from _both(Case("downsample", 192, 28, k=2, quick=True))


COMPILED = tuple(_compiled())


def _parameters(case: Case, tensor: Callable[..., Tensor]) -> MlpParameters:
    c, hidden = case.c, 4 * case.c
    vector, wide = tensor(c), tensor(hidden)
    gamma, grn = (None, wide) if case.grn else (vector, None)
    weight = tensor(case.n, c) if case.adaptive else vector
    bias = weight if case.norm == "layer" else None
    return MlpParameters(weight, bias, tensor(hidden, c), wide, tensor(c, hidden), vector, gamma, grn, grn)


def run(case: Case) -> None:
    """Call the launcher for `case`; a driver for "meta" must be active (see compile_only)."""

    def named(
        kernel: str, problem: tuple, candidates: Sequence[tuning.Candidate], gpu: tuning.Gpu
    ) -> tuning.Candidate | None:
        found = [c for c in candidates if case.plan in c.name]
        return predicted(found, gpu) if found else None

    with tuning.forced(named) if case.plan else nullcontext(), tf32(case.tf32):
        _run(case)


def _run(case: Case) -> None:
    dtype = DTYPES[case.dtype]
    module = importlib.import_module(f"{TRITON}.{case.op}")
    if case.op == "reduce":
        module.sum_partials(torch.empty(case.n, case.c, case.size**2, device="meta"), dtype)
        return

    def tensor(*shape: int) -> Tensor:
        rounded = case.autocast or case.op == "weights"
        return torch.empty(shape, dtype=torch.float32 if rounded else dtype, device="meta")

    def volume(c: int, size: int) -> Tensor:
        memory_format = torch.channels_last_3d if case.layout == "nhwc" else torch.contiguous_format
        return tensor(case.n, c, size, size, size).to(memory_format=memory_format)

    def image(c: int, size: int) -> Tensor:
        memory_format = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
        return tensor(case.n, c, size, size).to(memory_format=memory_format)

    x, vector = (volume if case.op == "dwconv3d" else image)(case.c, case.size), tensor(case.c)
    of_mlp = (_parameters(case, tensor), tensor(case.n), 1e-6, 1e-6, case.norm, case.activation, dtype)
    kept = {"hidden": image(4 * case.c, case.size)} if case.keeps else {}
    if case.op == "dwconv":
        call, inputs = DwconvCall(x, tensor(case.c, 1, *(case.sides or (case.k, case.k))), vector, (1, 1), 1, dtype), 3
    elif case.op == "dwconv3d":
        call, inputs = Dwconv3dCall(x, tensor(case.c, 1, case.k, case.k, case.k), vector, 1, dtype), 3
    elif case.op in ("layernorm", "grn"):
        call, inputs = NormCall(x, vector, vector if case.norm == "layer" else None, 1e-6, case.norm), 3
    elif case.op == "weights":
        module.matrices(MlpCall(x, None, _parameters(case, tensor), None, 1e-6, 1e-6, "layer", "gelu", dtype))
        return
    elif case.op == "mlp":
        call, inputs = MlpCall(x, image(case.c, case.size), *of_mlp), 11
    elif case.op == "block":
        parameters, scale, *others = of_mlp
        call = BlockCall(x, tensor(case.c, 1, case.k, case.k), vector, parameters, scale, (1, 1), *others)
        inputs = 12
        if case.autocast:
            y, w1, w2, *hidden = (t.to(dtype) for t in (x, *(call.p[i] for i in (2, 4)), *kept.values()))
            if case.backward:
                needs = [True] * 9 + [not case.grn, case.grn, case.grn]
                module.backward(x, call._replace(x=y), needs, y, w1, w2, *hidden)
            else:
                module.forward(call, y, torch.empty_like(y), w1, w2, *hidden)
            return
    else:
        weight = tensor(2 * case.c, case.c, case.k, case.k)
        call = DownsampleCall(x, vector, vector, weight, tensor(2 * case.c), 1e-6, "layer", dtype)
        inputs = 5
    if not case.backward:
        module.forward(call, **kept)
        return
    dout = image(2 * case.c, case.size // case.k) if case.op == "downsample" else torch.empty_like(x)
    needs = [True] * inputs
    if case.op == "layernorm":
        needs[2] = call.bias is not None
    if case.op in ("mlp", "block"):  # gamma, or GRN's two; the norm's bias
        needs[-8] = case.norm == "layer"
        needs[-3:] = [not case.grn, case.grn, case.grn]
    module.backward(dout, call, needs, **kept)
