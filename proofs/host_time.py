"""Host time of the Triton backend: what a call costs before a GPU has work, with a driver that launches nothing.

    python proofs/host_time.py [--check]

The unit is the time of ten `torch.add` of one element, because machines differ. Kernels are compiled for sm_90 and
their launches counted. Tensors are in CPU memory; PyTorch's matmuls, sums, convolutions and copies do nothing. A real
driver adds 2 to 4 us to each launch. Times are minima of processor time over short loops: other processes only add to
them. --check compares what does not depend on the machine: Python calls and launches. (A shared Xeon took 23 units for
what takes 11.8 on an EPYC.)
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import click
import timm
import torch
import torchvision
from checkout import ROOT  # noqa: F401  puts this checkout first on the path
from compile_only import CompileOnlyDriver
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver as drivers

import convnext_kernels as ck
from convnext_kernels.bench.timing import fastest, steady_allocator
from convnext_kernels.models import create_model

# Python calls, with 15 % for other versions of Python and PyTorch, and launches.
BLOCK, BLOCK_AUTOCAST, BLOCK_TRAINING, BLOCK_CPU, MODEL = (45, 2), (84, 3), (137, 11), (45, 0), (400, 61)


class _Launcher(CudaLauncher):
    """Triton calls this instead of a launch. It takes addresses, as the launchers of real drivers do."""

    launches = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        _Launcher.launches += 1


class Driver(CompileOnlyDriver):
    """A GPU of compute capability `arch` with CPU memory, on which every launch ends at once."""

    def __init__(self, arch: int = 90) -> None:
        super().__init__(arch, "cpu")
        self.launcher_cls = _Launcher


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, _: torch.Tensor, stride: list[int], *_rest: Any
) -> torch.Tensor:
    height, width = (size // step for size, step in zip(x.shape[2:], stride, strict=True))
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


def _convolution_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple:
    needs = rest[-1]
    bias = weight.new_empty(weight.shape[0])
    return tuple(torch.empty_like(t) if needed else None for t, needed in zip((x, weight, bias), needs, strict=True))


@contextmanager
def nothing_computed() -> Iterator[None]:
    """PyTorch's matmuls, sums, convolutions and copies return memory that they do not fill."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels of PyTorch are replaced
            for name, replacement in {
                "mm": _product,
                "addmm": lambda _, a, b, **scales: _product(a, b),
                "sum.dim_IntList": lambda x, *_, dtype=None: torch.empty(x.shape[1], dtype=dtype or x.dtype),
                "convolution": _convolution,
                "convolution_backward": _convolution_backward,
                "clone": torch.empty_like,
                "copy_": lambda target, *_: target,
            }.items():
                library.impl(name, replacement, "CPU")
        yield
    finally:
        library._destroy()


@contextmanager
def driver(arch: int = 90) -> Iterator[None]:
    """Make the driver that launches nothing Triton's active one."""
    before = drivers._active
    drivers.set_active(Driver(arch))
    try:
        yield
    finally:
        drivers._active = before


def seconds(call: Callable[[], object], least: float = 0.5) -> float:
    """The minimum processor time of one call, over loops of about 2 ms."""
    calls = max(1, int(0.002 / fastest(call, 0.02, clock=time.process_time)))
    return fastest(call, least, calls, clock=time.process_time)


def seconds_after(first: Callable[[], object], call: Callable[[], object]) -> float:
    """The time of `call` where `first` comes before each call, whose own time is subtracted."""
    return seconds(lambda: (first(), call()), 2.0) - seconds(first, 2.0)


def unit() -> float:
    """Seconds of ten `torch.add` of one element."""
    a, b = torch.zeros(1), torch.zeros(1)
    return seconds(lambda: [torch.add(a, b) for _ in range(10)])


def counted(call: Callable[[], object]) -> tuple[int, int]:
    """Return the Python calls and the launches of one call."""
    calls = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = _Launcher.launches
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls, _Launcher.launches - before


class _Allocating(torch.autograd.Function):
    """Allocates a block's result and gradients: what PyTorch takes for a Function, its backward pass and the memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *parameters)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


_LIBRARY = torch.library.Library("host_time", "DEF")
_LIBRARY.define("nothing(Tensor x) -> Tensor")
_LIBRARY.impl("nothing", torch.empty_like, "CompositeExplicitAutograd")


class Case(NamedTuple):
    """One row of the table."""

    name: str
    call: Callable[[], object]
    limit: tuple[int, int] | None = None  # Python calls and launches
    after: Callable[[], object] | None = None  # called before each call, and not counted


def cases() -> Iterator[Case]:
    """What is measured: single blocks, then a network."""

    def block(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[ck.FusedConvNeXtBlock, torch.Tensor]:
        x = torch.zeros(1, 96, 56, 56, dtype=dtype).to(memory_format=torch.channels_last)
        return ck.FusedConvNeXtBlock(96, backend="triton", memory="min", dtype=dtype, **options), x

    def forward(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                module(x)

        return call

    def training(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
        x = x.requires_grad_()
        dy = torch.zeros_like(x)
        inputs = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), inputs, dy)

    yield Case("block, forward", forward(*block()), BLOCK)
    yield Case("block V2, forward", forward(*block(use_grn=True)))
    rounded = forward(*block(torch.float32))

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            rounded()

    yield Case("block in fp32 under autocast, forward", autocast, BLOCK_AUTOCAST)
    trained = training(*block())
    yield Case("block, forward and backward", trained, BLOCK_TRAINING)
    module, x = block()
    inputs, dy = [x.requires_grad_(), *module.parameters()], torch.zeros_like(x)

    def allocating() -> None:
        torch.autograd.grad(_Allocating.apply(*inputs), inputs, dy)

    yield Case("PyTorch's part", allocating)
    yield Case("PyTorch's part, after a block", allocating, after=trained)  # which leaves the caches full
    yield Case("block V2, forward and backward", training(*block(use_grn=True)))

    # With packed weights: packing copies, which does nothing later.
    pixel = torch.zeros(1, 96, 1, 1).to(memory_format=torch.channels_last)
    on_cpu = forward(ck.FusedConvNeXtBlock(96, backend="cpu"), pixel)
    on_cpu()
    yield Case("CPU backend, block of one pixel", on_cpu, BLOCK_CPU)
    yield Case("an op that does nothing", lambda: torch.ops.host_time.nothing(pixel))

    image = torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    for name, model, limit in (
        ("ConvNeXt-T, forward", create_model("convnext_tiny", backend="triton"), MODEL),
        ("torchvision's, accelerated", ck.accelerate(torchvision.models.convnext_tiny(), backend="triton"), None),
        ("timm's, accelerated", ck.accelerate(timm.create_model("convnext_tiny"), backend="triton"), None),
    ):
        model = model.eval().to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        yield Case(name, forward(model, image), limit)


@click.command()
@click.option("--check", is_flag=True, help="Fail if there are more Python calls or launches than the limit.")
def main(check: bool) -> None:
    """Print host times in units of ten `torch.add`."""
    torch.set_num_threads(1)
    failed = []
    with driver():
        measured = list(cases())
    with driver(), nothing_computed(), steady_allocator():
        one = unit()
        print(f"unit: ten torch.add of one element, {one * 1e6:.1f} us")
        print(f"{'':46}{'units':>7}{'us':>9}{'calls':>8}{'launches':>10}{'limit':>10}")
        for case in measured:
            taken = seconds(case.call) if case.after is None else seconds_after(case.after, case.call)
            one = min(one, unit())
            calls, launches = counted(case.call)
            limit = "" if case.limit is None else "{}, {}".format(*case.limit)
            print(f"{case.name:46}{taken / one:7.2f}{taken * 1e6:9.1f}{calls:8}{launches:10}{limit:>10}")
            if case.limit is not None and (calls > case.limit[0] or launches > case.limit[1]):
                failed.append(case.name)
    if check and failed:
        raise SystemExit("above their limit: " + ", ".join(failed))


if __name__ == "__main__":
    main()
