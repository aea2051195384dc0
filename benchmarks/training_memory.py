"""Peak memory of a whole training step on this machine.

    python benchmarks/training_memory.py [--threads 2] [--quick]

Growth of the resident memory, to its peak, in a training step of ConvNeXt-T at batch 8, 224x224: activations, gradients
and temporaries. Each candidate runs in a new process, with PyTorch's and glibc's default settings, after two steps for
warm-up, so compiling is not in it, and after gradients were dropped. The row "accelerate" is torchvision's ConvNeXt-T,
the rows with a setting of `memory` are this package's own. tests/ops/test_memory.py counts what a
block keeps for its gradient.
"""

import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import click
import torch

from convnext_kernels import accelerate
from convnext_kernels.bench.candidates import DTYPES
from convnext_kernels.bench.measure import peak_growth
from convnext_kernels.bench.tables import Table
from convnext_kernels.bench.training import TrainingStep, WithLoss
from convnext_kernels.bench.workloads import initialise
from convnext_kernels.cli import options
from convnext_kernels.models import create_model

PYTORCH, COMPILED = "eager PyTorch", "torch.compile"
STEPS = (PYTORCH, COMPILED, "accelerate", *(f"models, {memory}" for memory in ("auto", "balanced", "min")))


def measure(who: str, dtype: str, batch: int, size: int, threads: int | None) -> int:
    """Bytes by which a training step grows, the median of three. In this process, a new one."""
    torch.set_num_threads(threads or torch.get_num_threads())
    if who.startswith("models"):
        model = create_model("convnext_tiny", memory=who.partition(", ")[2])
    else:
        from torchvision.models import convnext_tiny

        model = convnext_tiny(stochastic_depth_prob=0.0)
    initialise(model)
    form = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    model, x = model.train().to(**form), torch.randn(batch, 3, size, size).to(**form)
    module = WithLoss(accelerate(model) if who == "accelerate" else model)
    module = torch.compile(module, fullgraph=True, dynamic=False) if who == COMPILED else module
    step = TrainingStep(module, (x, torch.randint(1000, (batch,))))
    found = []
    for _ in range(5):
        step.module.zero_grad(set_to_none=True)
        found.append(peak_growth(step, "cpu"))
    return int(statistics.median(found[2:]))


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", is_flag=True, help="Batch 2, 64x64, only to show that it works.")
@options.count("--threads", None, "CPU threads of PyTorch.")
def main(quick: bool, threads: int | None) -> None:
    """Measure and print."""
    rows = []
    for dtype in ("bf16", "fp32"):
        found: dict[str, int] = {}
        for who in STEPS:
            print(f"{who}, {dtype} ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                shape = (2, 64) if quick else (8, 224)
                found[who] = pool.submit(measure, who, dtype, *shape, threads).result()
            rows.append((who, dtype, f"{found[who] / 2**20:.0f}", f"{found[who] / found[PYTORCH]:.0%}"))
    options.show(Table("a training step of ConvNeXt-T", ("who", "dtype", "MiB", "of eager's"), rows))


if __name__ == "__main__":
    main()
