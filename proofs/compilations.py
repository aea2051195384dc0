"""How often each Triton kernel is compiled for one network at many image and batch sizes. Nothing is compiled or run.

    python proofs/compilations.py [--check] [--dtype fp32]
    python proofs/compilations.py --cold [--check]

An accelerated torchvision ConvNeXt-T runs with a driver that launches nothing (`host_time.py`): inference at all sizes
and batches, then some training steps. Triton asks a hook before it compiles; the hook counts and says not to. The
depthwise kernels also compute the input's gradient, with a residual and without a bias: that is counted apart.

--cold compiles: the processor time of a first training step with an empty cache on disk, for sm_90.
"""

import itertools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch
import torchvision
import triton
from checkout import ROOT  # noqa: F401  puts this checkout first on the path
from compile_only import compile_only
from host_time import driver, nothing_computed

import convnext_kernels as ck

LIMIT = 12  # compilations of one kernel
SECONDS = 60.0  # of a first training step

# (height, width): the standard ones, other multiples of 32, odd multiples of the patches, not square.
SIZES = (
    *((size, size) for size in (160, 176, 192, 196, 208, 224, 236, 240, 256, 288, 320, 384, 448, 512)),
    *((224, 160), (192, 256), (300, 400), (333, 500), (256, 512), (480, 352)),
)
BATCHES = (1, 2, 3, 5, 8, 16, 32, 64)
# Training steps: every image size twice, all batches.
STEPS = tuple((BATCHES[(i + j) % len(BATCHES)], size) for i, size in enumerate(SIZES) for j in (0, 3))


@contextmanager
def counting() -> Iterator[dict[str, set[str]]]:
    """The compilations by kernel, as Triton's keys for them; nothing is compiled or launched."""
    found: dict[str, set[str]] = defaultdict(set)

    def hook(*, key: str, fn: Any, compile: dict, **_: Any) -> bool:
        names = list(fn.jit_function.signature.parameters)
        gradient = "FLIP" in names and compile["constants"].get((names.index("FLIP"),))
        found[fn.jit_function.fn.__name__ + (", input gradient" if gradient else "")].add(key)
        return True  # do not compile

    with driver(), nothing_computed(), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        yield found


def image(batch: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Images without defined values."""
    return torch.empty(batch, 3, *size, dtype=dtype, memory_format=torch.channels_last)


def step(network: torch.nn.Module, x: torch.Tensor) -> None:
    """One training step."""
    y = network(x)
    torch.autograd.grad(y, list(network.parameters()), torch.zeros_like(y))


def cold(network: torch.nn.Module, x: torch.Tensor) -> tuple[float, int]:
    """Processor time of a first training step, that of the assembler too, and the number of kernels it compiles."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), compile_only(90, "cpu") as launches:
        triton.knobs.cache.dir = folder
        network = ck.accelerate(network, backend="triton").train()
        begin = sum(os.times()[:4])
        with nothing_computed():
            step(network, x)
        return sum(os.times()[:4]) - begin, len({launch.hash for launch in launches})


@click.command(help=__doc__.splitlines()[0])
@click.option("--check", is_flag=True, help=f"Fail above {LIMIT} compilations, or above {SECONDS:g} seconds.")
@click.option("--cold", "compiling", is_flag=True, help="Compile the kernels of a training step.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
def main(check: bool, compiling: bool, dtype: str) -> None:
    form = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    begin = time.perf_counter()
    network = torchvision.models.convnext_tiny().to(form).to(memory_format=torch.channels_last)  # computed
    if compiling:
        taken, kernels = cold(network, image(8, (224, 224), form))
        print(f"ConvNeXt-T {dtype}, sm_90, batch 8: {taken:.1f} s for {kernels} kernels, nothing in the cache before")
        if check and taken > SECONDS:
            raise SystemExit(f"cold compilation took {taken:.0f} s, limit {SECONDS:g} s")
        return
    with counting() as found:
        ck.accelerate(network.eval(), backend="triton")
        with torch.no_grad():
            for size, batch in itertools.product(SIZES, BATCHES):
                network(image(batch, size, form))
        inferred = {kernel: len(keys) for kernel, keys in found.items()}
        network.train()
        for batch, size in STEPS:
            step(network, image(batch, size, form))
    taken = time.perf_counter() - begin
    print(f"ConvNeXt-T {dtype}, {len(SIZES)} image sizes, {len(BATCHES)} batches: {taken:.1f} s")
    print(f"{'compilations':40}{'inference':>10}{'and training':>14}")
    for kernel, keys in sorted(found.items()):
        print(f"{kernel:40}{inferred.get(kernel, 0):10}{len(keys):>14}")
    above = [kernel for kernel, keys in found.items() if len(keys) > LIMIT]
    if check and above:
        raise SystemExit(f"compiled more than {LIMIT} times: " + ", ".join(above))


if __name__ == "__main__":
    main()
