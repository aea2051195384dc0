"""How often each Triton kernel is compiled for one network at many image and batch sizes. Nothing is compiled or run.

    python proofs/compilations.py [--check] [--full] [--dtype fp32] [--training]

An accelerated torchvision ConvNeXt-T runs with a driver that launches nothing (`host_time.py`). Triton asks a hook
before it compiles; the hook counts and answers that nothing is to be compiled.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch
import triton
from checkout import ROOT  # noqa: F401  puts this checkout first on the path
from host_time import driver, nothing_computed

import convnext_kernels as ck

LIMIT = 12  # compilations of one kernel

# (height, width): the standard ones, other multiples of 32, odd multiples of the patches, not square.
SIZES = (
    *((size, size) for size in (160, 176, 192, 196, 208, 224, 236, 240, 256, 288, 320, 384, 448, 512)),
    *((224, 160), (192, 256), (300, 400), (333, 500), (256, 512), (480, 352)),
)
BATCHES = (1, 2, 3, 5, 8, 16, 32, 64)
# Training steps: every image size once or twice, all batches.
STEPS = tuple((BATCHES[(i + j) % len(BATCHES)], size) for i, size in enumerate(SIZES) for j in (0, 3))


@contextmanager
def counting() -> Iterator[dict[str, set[str]]]:
    """The compilations by kernel, as Triton's keys for them; nothing is compiled or launched."""
    found: dict[str, set[str]] = defaultdict(set)

    def hook(*, key: str, fn: Any, **_: Any) -> bool:
        found[fn.jit_function.fn.__name__].add(key)
        return True  # do not compile

    with driver(), nothing_computed(), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        yield found


def model(dtype: torch.dtype) -> torch.nn.Module:
    """An accelerated ConvNeXt-T of torchvision."""
    import torchvision

    network = torchvision.models.convnext_tiny().to(dtype).to(memory_format=torch.channels_last)
    return ck.accelerate(network, backend="triton")


def image(batch: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Images without defined values."""
    return torch.empty(batch, 3, *size, dtype=dtype, memory_format=torch.channels_last)


def infer(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """All sizes at all batches."""
    network.eval()
    with torch.no_grad():
        for size in SIZES:
            for batch in BATCHES:
                network(image(batch, size, dtype))


def train(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """A training step for each of `STEPS`."""
    network.train()
    for batch, size in STEPS:
        y = network(image(batch, size, dtype))
        torch.autograd.grad(y, list(network.parameters()), torch.zeros_like(y))


@click.command()
@click.option("--check", is_flag=True, help=f"Fail if a kernel is compiled more than {LIMIT} times.")
@click.option("--full", is_flag=True, help="Print the keys.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--training", is_flag=True, help="Also training steps.")
def main(check: bool, full: bool, dtype: str, training: bool) -> None:
    """Count compilations."""
    type_ = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    begin = time.perf_counter()
    with counting() as found:
        network = model(type_)
        infer(network, type_)
        inferred = {kernel: len(keys) for kernel, keys in found.items()}
        if training:
            train(network, type_)
    print(f"ConvNeXt-T, {len(SIZES)} image sizes, {len(BATCHES)} batches, {dtype}: {time.perf_counter() - begin:.1f} s")
    print(f"{'kernel':40}{'inference':>10}{'all' if training else '':>10}")
    for kernel, keys in sorted(found.items()):
        print(f"{kernel:40}{inferred.get(kernel, 0):10}{len(keys) if training else '':>10}")
        if full:
            print("\n".join(sorted(keys)))
    above = [kernel for kernel, keys in found.items() if len(keys) > LIMIT]
    if check and above:
        raise SystemExit(f"compiled more than {LIMIT} times: " + ", ".join(above))


if __name__ == "__main__":
    main()
