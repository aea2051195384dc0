"""Numerical checks of every kernel: all ops, backends and instruction sets of this machine, at a table of shapes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.bench import workloads
from convnext_kernels.bench.candidates import CANDIDATES, Call, Candidate, Prepared, tf32
from convnext_kernels.bench.cases import STANDARD, Case
from convnext_kernels.bench.measure import Session, prepare, results
from convnext_kernels.bench.results import EAGER, Record
from convnext_kernels.bench.workloads import Step

# (N, C, H, W): sizes below, equal to, a multiple of and above the kernels' vectors and tiles. The most telling first:
# `verify` may run out of time.
SHAPES = (
    (1, 96, 14, 14),
    (3, 40, 7, 5),
    (1, 8, 1, 1),
    (3, 8, 5, 7),
    (1, 40, 13, 14),
    (3, 96, 7, 13),
    (1, 100, 5, 14),
    (3, 100, 13, 1),
    (2, 130, 7, 7),
    (1, 17, 28, 29),
)
# The stages of ConvNeXt-T, where the plans of mlp change; not in fp16 on a CPU, where PyTorch's own convolution takes
# up to 18 s for one of them, forward and backward.
WIDE = ((1, 96, 56, 56), (1, 192, 28, 28), (2, 384, 14, 14), (1, 768, 7, 7))
KINDS = (  # (op, label, arguments of the workload after the shape); those of the networks first
    ("block", " V1", (False,)),
    ("block", " V2", (True,)),
    ("downsample", " 2x2", (2,)),
    ("layernorm", "", ()),
    ("dwconv", " K7", (7,)),
    ("mlp", " V1", (False,)),
    ("mlp", " V2", (True,)),
    ("grn", "", ()),
    ("dwconv", " K3", (3,)),
    ("dwconv", " K13", (13,)),
    ("dwconv", " K31", (31,)),
    ("dwconv", " K7 dilation 2", (7, 2)),
    ("dwconv", " K3 dilation 3", (3, 3)),
    ("dwconv", " K1x11", ((1, 11),)),
    ("dwconv", " K51x5", ((51, 5),)),
    ("dwconv", " K7 stride 2", (7, 1, 2)),
    ("block", " V1 K11", (False, 11)),
    ("dwconv3d", " K3 depth 4", (3, 4)),
    ("dwconv3d", " K5 depth 3 stride 2", (5, 3, 2)),
    ("dwconv3d_transposed", " K5 depth 3", (5, 3)),
    ("layernorm", " RMS", ("rms",)),
)
Backend = tuple[str, Callable[[], AbstractContextManager]]


def backends(device: str) -> tuple[list[Backend], list[str]]:
    """Return (name, context that selects it) of the backends that run on `device`, and why the others do not."""
    found: list[Backend] = []
    missing = []
    for name, status in dispatch.list_backends().items():
        if not status.available:
            missing.append(f"backend {name}: {status.reason}")
        elif name == "cpu" and device == "cpu":
            from convnext_kernels.backends import cpu

            found += [(f"cpu {isa}", partial(cpu.use_isa, isa)) for isa in cpu.supported_isas()]
        elif name != "cpu":
            found.append((name, nullcontext))
    return found, missing


def cases(device: str, dtype: str) -> Iterator[Case]:
    """What is checked in `dtype`, the most telling first: the stages of ConvNeXt-T, then every op at each shape."""
    for n, c, h, w in WIDE + SHAPES:
        wide = (n, c, h, w) in WIDE
        if wide and dtype == "fp16" and device == "cpu":
            continue
        for op, label, arguments in KINDS:
            if (wide and op not in ("mlp", "block", "layernorm")) or (op == "downsample" and min(h, w) < arguments[0]):
                continue
            build = partial(workloads.op, op, n, c, h, w, *arguments)
            yield Case(op, f"{n}x{c}x{h}x{w}{label}", n, dtype, "training", "", build)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN: it may be memory that holds the right result of an earlier call."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about its own operators
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _BothWays(Step):
    """A step that runs in inference mode too, which may take other kernels, inside `context`."""

    context: Callable[[], AbstractContextManager] = staticmethod(nullcontext)

    def __call__(self) -> Tensor:
        with self.context():
            with torch.inference_mode():
                self.inference = self.forward()
            return super().__call__()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last call, and its output in inference mode."""
        return {"inference": self.inference} | super().gradients()


def _both_ways(case: Case) -> Case:
    return replace(case, build=lambda: replace(case.build(), step=_BothWays))


def _on(name: str, selected: Callable[[], AbstractContextManager]) -> Candidate:
    """The candidate that is this package on the backend `name`."""

    @contextmanager
    def context() -> Iterator[None]:
        with dispatch.use_backend(name.split()[0]), selected(), _poisoned_memory():
            yield

    def build(prepared: Prepared) -> Call:
        step = prepared.call(*prepared.parts("ours"))
        step.context = context
        return step

    return Candidate(f"{name} backend" if name == EAGER else name, build)


def check(case: Case, device: str, found: list[Backend]) -> list[Record]:
    """Check a case on each of the backends `found`: forward, inference and all gradients against fp64."""
    candidates = (CANDIDATES[0], *(_on(*backend) for backend in found))
    return Session(device, STANDARD, candidates=candidates).measure(_both_ways(case), timed=False)[1:]


def compile_kernels(case: Case, device: str) -> None:
    """Run a case on the Triton backend, so that its kernels are in Triton's cache."""
    with tf32(False):
        results(_on("triton", nullcontext).build(prepare(_both_ways(case), device)))
