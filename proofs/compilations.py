"""How often each Triton kernel is compiled for one network at many image and batch sizes. Nothing is compiled or run.

    python proofs/compilations.py [--check] [--quick] [--full] [--dtype fp32]

An accelerated torchvision ConvNeXt-T runs with a driver that launches nothing (`host_time.py`): inference at all sizes
and batches, then some training steps. Triton asks a hook before it compiles; the hook counts and says not to. The
depthwise kernels also compute the input's gradient, with a residual and without a bias: that is counted apart.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
QUICK_BATCHES = (1, 8, 64)
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


def model(dtype: torch.dtype) -> torch.nn.Module:
    """ConvNeXt-T of torchvision."""
    import torchvision

    return torchvision.models.convnext_tiny().to(dtype).to(memory_format=torch.channels_last)


def image(batch: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Images without defined values."""
    return torch.empty(batch, 3, *size, dtype=dtype, memory_format=torch.channels_last)


def infer(network: torch.nn.Module, dtype: torch.dtype, batches: Sequence[int]) -> None:
    """All sizes at all batches."""
    network.eval()
    with torch.no_grad():
        for size in SIZES:
            for batch in batches:
                network(image(batch, size, dtype))


def train(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """A training step for each of `STEPS`."""
    network.train()
    for batch, size in STEPS:
        y = network(image(batch, size, dtype))
        torch.autograd.grad(y, list(network.parameters()), torch.zeros_like(y))


@click.command()
@click.option("--check", is_flag=True, help=f"Fail if a kernel is compiled more than {LIMIT} times.")
@click.option("--quick", is_flag=True, help=f"Inference only, batches {QUICK_BATCHES}.")
@click.option("--full", is_flag=True, help="Also print what each compiled kernel is specialised for.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
def main(check: bool, quick: bool, full: bool, dtype: str) -> None:
    """Count compilations."""
    type_ = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    batches = QUICK_BATCHES if quick else BATCHES
    begin = time.perf_counter()
    network = model(type_)  # with its first values, which are computed
    with counting() as found:
        ck.accelerate(network, backend="triton")
        infer(network, type_, batches)
        inferred = {kernel: len(keys) for kernel, keys in found.items()}
        if not quick:
            train(network, type_)
    taken = time.perf_counter() - begin
    print(f"ConvNeXt-T {dtype}, {len(SIZES)} image sizes, {len(batches)} batches: {taken:.1f} s")
    print(f"{'compilations':40}{'inference':>10}{'' if quick else 'and training':>14}")
    for kernel, keys in sorted(found.items()):
        print(f"{kernel:40}{inferred.get(kernel, 0):10}{'' if quick else len(keys):>14}")
        if full:
            print("\n".join(sorted(keys)))
    above = [kernel for kernel, keys in found.items() if len(keys) > LIMIT]
    if check and above:
        raise SystemExit(f"compiled more than {LIMIT} times: " + ", ".join(above))


if __name__ == "__main__":
    main()
