"""Memory of training on this machine: what a block keeps for its gradient, and the peak of a whole training step.

    python benchmarks/training_memory.py [blocks] [step] [--quick]

*blocks*: bytes that a forward pass saves for the backward pass, in units of the bytes of x. x itself is included,
parameters are not; each storage counts once. `saved_tensors_hooks` see every tensor that autograd keeps, also in a
compiled forward pass, because AOTAutograd passes what its backward graph needs to `save_for_backward` of one autograd
function. Candidates are eager PyTorch, torch.compile and every backend that runs here with each setting of `memory`.
Without a GPU, Triton runs in its interpreter, at a small size; the ratio does not depend on the size.

*step*: growth of the resident memory, to its peak, in a training step of ConvNeXt-T at batch 8, 224x224: activations,
gradients and temporaries. Each candidate runs in a new process, with PyTorch's and glibc's default settings, after two
steps for warm-up, so compiling is not in it, and after gradients were dropped. The row "accelerate" is torchvision's
ConvNeXt-T, the rows with a setting of `memory` are this package's own.
"""

import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import click
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import convnext_kernels as ck
from convnext_kernels.bench.candidates import DTYPES, quiet
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.measure import peak_growth, saved_bytes
from convnext_kernels.bench.tables import Table
from convnext_kernels.bench.training import TrainingStep, WithLoss
from convnext_kernels.bench.workloads import EagerBlock, Step, initialise
from convnext_kernels.cli import options
from convnext_kernels.models import create_model

MEMORY = ("auto", "balanced", "min")
PYTORCH, COMPILED = "eager PyTorch", "torch.compile"
SMALL = ((96, 7), (384, 7))  # for the interpreter
STEPS = (PYTORCH, COMPILED, "accelerate", *(f"models, {memory}" for memory in MEMORY))


def kept(who: str, memory: str, use_grn: bool, c: int, size: int, n: int, dtype: str) -> float:
    """Bytes that a forward pass of one block keeps, in units of x's bytes."""
    device = "cuda" if who in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    if who in (PYTORCH, COMPILED):
        block = EagerBlock(c, use_grn)
    else:
        block = ck.FusedConvNeXtBlock(c, use_grn=use_grn, memory=memory, backend=who)
    form = {"device": device, "dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    block, x = block.to(**form), torch.randn(n, c, size, size).to(**form)
    step = Step(torch.compile(block, fullgraph=True, dynamic=False) if who == COMPILED else block, (x,))
    with quiet():
        if who == COMPILED:
            step()
        found = saved_bytes(step) / (x.numel() * x.element_size())
    torch.compiler.reset()
    return found


def blocks(quick: bool) -> Table:
    """The table of *blocks*, with the least and the most over the sizes. tests/ops/test_memory.py has the limits."""
    candidates = [(PYTORCH, ""), (COMPILED, "")]
    candidates += [(name, m) for name, status in ck.list_backends().items() if status.available for m in MEMORY]
    rows = []
    for who, memory in candidates:
        print(f"{who} {memory} ...", file=sys.stderr, flush=True)
        small = who == "triton" and not torch.cuda.is_available()
        stages, n = (SMALL, 1) if small else (STAGES, 8)
        for dtype in ("bf16", "fp32"):
            for what in ("V1", "V2"):
                found = [kept(who, memory, what == "V2", *stage, n, dtype) for stage in stages[-1 if quick else 0 :]]
                text = "-".join(dict.fromkeys((f"{min(found):.2f}", f"{max(found):.2f}")))
                rows.append((who, memory, what, dtype, text))
    title = "kept for the gradient by a block, in units of the bytes of x: range over its sizes"
    return Table(title, ("who", "memory", "block", "dtype", "kept"), rows)


def measure_step(who: str, dtype: str, batch: int, size: int, threads: int | None) -> int:
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
    module = WithLoss(ck.accelerate(model) if who == "accelerate" else model)
    module = torch.compile(module, fullgraph=True, dynamic=False) if who == COMPILED else module
    step = TrainingStep(module, (x, torch.randint(1000, (batch,))))
    found = []
    for _ in range(5):
        step.module.zero_grad(set_to_none=True)
        found.append(peak_growth(step, "cpu"))
    return int(statistics.median(found[2:]))


def steps(batch: int, size: int, threads: int | None) -> Table:
    """The table of *step*."""
    rows = []
    for dtype in ("bf16", "fp32"):
        found: dict[str, int] = {}
        for who in STEPS:
            print(f"step: {who}, {dtype} ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[who] = pool.submit(measure_step, who, dtype, batch, size, threads).result()
            rows.append((who, dtype, f"{found[who] / 2**20:.0f}", f"{found[who] / found[PYTORCH]:.0%}"))
    return Table("a training step of ConvNeXt-T", ("who", "dtype", "MiB", "of eager's"), rows)


@click.command(help=__doc__.splitlines()[0])
@click.argument("parts", nargs=-1, type=click.Choice(["blocks", "step"]))
@click.option("--quick", is_flag=True, help="One stage; the step at batch 2, 64x64, only to show that it works.")
@options.count("--threads", None, "CPU threads of PyTorch in a step.")
def main(parts: tuple[str, ...], quick: bool, threads: int | None) -> None:
    """Count, measure and print."""
    parts = parts or ("blocks", "step")
    if "step" in parts:
        options.show(steps(*((2, 64) if quick else (8, 224)), threads), width=160)
    if "blocks" in parts:
        options.show(blocks(quick), width=160)


if __name__ == "__main__":
    main()
