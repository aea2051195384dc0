"""Every case of the benchmarks, for the command line and for pytest."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from convnext_kernels.bench import training, workloads
from convnext_kernels.bench.workloads import Workload

QUICK, STANDARD, FULL = "quick", "standard", "full"
MODES = (QUICK, STANDARD, FULL)  # each includes the cases of the modes before it
STEP, WEIGHT_GRADIENT = "step", "weight-gradient"  # of bench/training.py

# Groups in the order in which they run, and the seconds that a case takes on two cores.
GROUPS = {"layernorm": 1, "dwconv": 1, "dwconv3d": 20, "mlp": 2, "block": 6, "model": 12, "rival": 6}
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))  # of ConvNeXt-T at 224: C, H = W (arXiv 2201.03545, table 9)
KERNELS = (3, 5, 7, 9, 11, 13, 21, 31)
# Height, width and stride: InceptionNeXt's, SegNeXt's and SLaK's kernels, and the strided blocks of timm.
SHAPES = ((1, 11, 1), (11, 1, 1), (21, 1, 1), (51, 5, 1), (7, 7, 2))
SOUND = (512, 938)  # C, L: ten seconds of sound in Vocos (arXiv 2306.00814)
# Of MedNeXt's stages, for depthwise convolutions of volumes: C, D = H = W, side of the kernel.
VOLUMES = ((32, 64, 3), (64, 32, 5), (128, 16, 7))
CONVNEXTS = {  # label: (library, name)
    "ConvNeXt-T": ("torchvision", "convnext_tiny"),
    "ConvNeXt-S": ("torchvision", "convnext_small"),
    "ConvNeXt-B": ("torchvision", "convnext_base"),
    "ConvNeXt-V2-T": ("timm", "convnextv2_tiny"),
}
NETWORKS = {"ConvNeXt-T": "convnext_tiny", "ConvNeXt-V2-T": "convnextv2_tiny"}  # of `convnext_kernels.models`
RIVALS = {  # alternatives to a ConvNeXt: (library, name)
    "ResNet-50": ("torchvision", "resnet50"),
    "ResNeXt-50": ("torchvision", "resnext50_32x4d"),
    "MobileNetV2": ("torchvision", "mobilenet_v2"),
    "Swin-T": ("torchvision", "swin_t"),
    "ViT-S/16": ("timm", "vit_small_patch16_224"),
    "ViT-B/16": ("torchvision", "vit_b_16"),
}


@dataclass(frozen=True)
class Case:
    """One op or model, with its shape, batch, dtype and direction."""

    group: str  # of GROUPS, or another op
    what: str
    batch: int
    dtype: str  # fp32, bf16, fp16 or tf32
    direction: str  # "forward", "training" (forward and backward), STEP or WEIGHT_GRADIENT
    mode: str  # the smallest mode that includes it
    build: Callable[[], Workload] = field(compare=False, repr=False)
    channels: int = 0  # of an op

    @property
    def trains(self) -> bool:
        """Whether a call has a backward pass."""
        return self.direction in ("training", STEP)

    @property
    def name(self) -> str:
        """Unique, and valid in file names and test ids except for the slash after the group."""
        what = self.what.replace(" ", "-").replace("/", "")
        return f"{self.group}/{what}-b{self.batch}-{self.dtype}-{self.direction}"


def _op(
    group: str,
    what: str,
    n: int,
    dtype: str,
    direction: str,
    mode: str,
    c: int,
    sides: tuple[int, ...],
    *options: object,
    kind: str = "",
) -> Case:
    """`sides`: (H, W), or (D, H, W) of volumes; `options` and `kind`: of `workloads.op`."""
    build = partial(workloads.op, kind or group, n, c, *sides[-2:], *options, *sides[:-2])
    what = f"{what} C{c} {'x'.join(map(str, sides))}".strip()
    return Case(group, what, n, dtype, direction, mode, build, c)


def _ops(dtype: str, direction: str, n: int) -> list[Case]:
    """The cases of single ops and of the block, at the shapes of the four stages."""
    trains, found = direction == "training", []

    def add(group: str, what: str, mode: str, *arguments: object, kind: str = "") -> None:
        found.append(_op(group, what, n, dtype, direction, mode, *arguments, kind=kind))

    beyond = FULL if trains else STANDARD
    for c, size in STAGES:
        at, quick = (size, size), QUICK if c == 384 and n == 1 else STANDARD
        for k in KERNELS:
            add("dwconv", f"K{k}", quick if k == 7 else beyond, c, at, k)
        for height, width, stride in SHAPES if c in (96, 384) else ():
            sides = f"{height}x{width}" if height != width else f"{height}s{stride}"
            add("dwconv", f"K{sides}", beyond, c, at, (height, width), 1, stride)
        add("layernorm", "", quick, c, at)
        for label, grn in (("V1", False), ("V2", True)):
            add("mlp", label, quick, c, at, grn)
            add("block", label, QUICK if trains and c == 384 else quick, c, at, grn)
        if c in (96, 384):
            add("block", "RMS", STANDARD, c, at, False, 7, "rms", "silu")
    for label, grn in (("1-D V1", False), ("1-D V2", True)):
        add("block", label, STANDARD, SOUND[0], (1, SOUND[1]), grn, kind="block1d")
    return found


def _volumes(dtype: str, direction: str) -> list[Case]:
    """Depthwise convolutions of volumes and MedNeXt's block. In no smaller mode: PyTorch's weight gradient takes up to
    two seconds.
    """
    rows = [("dwconv3d", "", "", *volume) for volume in VOLUMES]
    c, size, k = VOLUMES[1]
    rows += [("dwconv3d", "dwconv3d_transposed", "up ", c, size // 2, k), ("block", "mednext", "MedNeXt ", c, size, k)]
    return [
        _op(group, f"{label}K{k}", 1, dtype, direction, FULL, c, (size,) * 3, k, kind=kind)
        for group, kind, label, c, size, k in rows
    ]


def _convnext(label: str, n: int, size: int, dtype: str, direction: str, mode: str) -> Case:
    build = partial(workloads.convnext, *CONVNEXTS[label], n, size)
    return Case("model", f"{label} {size}", n, dtype, direction, mode, build)


def network(label: str, n: int, dtype: str, direction: str) -> Case:
    """A model of NETWORKS at 224 x 224, built by this package: the same case as in `cases`, without another library."""
    build = partial(workloads.network, NETWORKS[label], n, 224)
    return Case("model", f"{label} 224", n, dtype, direction, STANDARD, build)


def _models(dtype: str) -> list[Case]:
    found = []
    for n in (1, 8):
        for label in CONVNEXTS:
            for size in (224, 384):
                first = label == "ConvNeXt-T" and size == 224
                # Batch 8 of the larger models takes seconds per call on two cores and shows nothing new.
                mode = QUICK if first and n == 1 else STANDARD if first or n == 1 else FULL
                found.append(_convnext(label, n, size, dtype, "forward", mode))
        for label, (library, name) in RIVALS.items():
            build, mode = partial(workloads.rival, library, name, n, 224), STANDARD if n == 1 else FULL
            found.append(Case("rival", f"{label} 224", n, dtype, "forward", mode, build))
    return [*found, *(_convnext("ConvNeXt-T", n, 224, dtype, "training", m) for n, m in ((2, STANDARD), (8, FULL)))]


def _steps(found: list[Case]) -> list[Case]:
    """Training steps at batch 8, and depthwise weight gradients alone, of the cases of `found` with a backward pass."""
    more = []
    for case in found:
        model, volume = case.group == "model", case.group == "dwconv3d"
        if not case.trains:
            continue
        if volume or (case.group == "dwconv" and case.what.startswith("K7 ")):
            build = partial(training.weight_gradient, case.build)
            more.append(replace(case, direction=WEIGHT_GRADIENT, mode=FULL, build=build))
        elif case.batch == 8 and case.group in ("block", "model"):
            for autocast in (False, True) if model and case.dtype == "bf16" else (False,):
                build, what = partial(training.step, case.build, model, autocast), case.what + " autocast" * autocast
                more.append(replace(case, what=what, direction=STEP, mode=FULL, build=build))
    return more


def cases(device: str = "cpu") -> list[Case]:
    """Every case for `device`, cheap groups first."""
    found = []
    for dtype in ("fp32", "bf16", "fp16", "tf32") if device == "cuda" else ("fp32", "bf16"):
        for direction, n in (("forward", 1), ("forward", 8), ("training", 8)):  # nobody trains at batch 1
            found += _ops(dtype, direction, n)
        for direction in ("forward", "training"):
            found += _volumes(dtype, direction)
        found += _models(dtype)
    found += _steps(found) if device == "cpu" else []
    return sorted(found, key=lambda case: list(GROUPS).index(case.group))


def select(mode: str, only: tuple[str, ...] = (), device: str = "cpu") -> list[Case]:
    """The cases of `mode` whose name contains one of `only`, or matches it as a shell pattern.

    A pattern that matches only cases of larger modes selects those. ValueError for a pattern that matches no case.
    """
    everything = cases(device)
    included = MODES[: MODES.index(mode) + 1]
    if not only:
        return [case for case in everything if case.mode in included]
    chosen = set()
    for pattern in only:
        matches = [c for c in everything if pattern.lower() in c.name.lower() or fnmatch.fnmatch(c.name, pattern)]
        if not matches:
            groups = ", ".join(dict.fromkeys(c.group for c in everything))
            raise ValueError(
                f"{pattern!r}: no case has this in its name; groups: {groups}; example of a name: {everything[0].name}"
            )
        chosen.update([case.name for case in matches if case.mode in included] or [case.name for case in matches])
    return [case for case in everything if case.name in chosen]
