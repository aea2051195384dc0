"""Memory of training on this machine: what a block keeps for its gradient, and the peak of a whole training step.

    python benchmarks/training_memory.py [blocks] [step] [--quick]

*blocks*: bytes that a forward pass saves for the backward pass, in units of the bytes of x. x itself is included,
parameters are not; each storage counts once. `saved_tensors_hooks` see every tensor that autograd keeps, also in a
compiled forward pass, because AOTAutograd passes what its backward graph needs to `save_for_backward` of one autograd
function. Candidates are eager PyTorch, torch.compile and every backend that runs here with each setting of `memory`.
Without a GPU, Triton runs in its interpreter and the CUDA kernels are built for the CPU, both at a small size; the
ratio does not depend on the size.

*step*: peak resident set of a training step of ConvNeXt-T at batch 8, 224x224 (zero_grad, forward, cross entropy,
backward, AdamW(fused=True)). Each candidate runs in a new process, with PyTorch's and glibc's default settings. The
peak is reset (/proc/self/clear_refs) after two warm-up steps, after gradients were dropped and freed memory was
returned, so compiling is not in the peak. "step" is the peak minus what was resident right before: activations,
gradients and temporaries. The row "accelerate" is torchvision's ConvNeXt-T, the rows with a setting of `memory` are
this package's own.
"""

import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import convnext_kernels as ck
from convnext_kernels import FusedConvNeXtBlock, accelerate, models
from convnext_kernels.bench.candidates import DTYPES, Step, quiet
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.measure import reset_peak, resident, saved_bytes
from convnext_kernels.bench.tables import Table
from convnext_kernels.bench.workloads import EagerBlock, initialise
from convnext_kernels.cli import options

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from training import TrainingStep, WithLoss, target_of  # noqa: E402

MEMORY = ("auto", "balanced", "min")
PYTORCH, COMPILED = "eager PyTorch", "torch.compile"
EMULATED, SMALL = ("triton", "cuda"), ((96, 7), (384, 7))  # without a GPU
STEPS = (PYTORCH, COMPILED, "accelerate", *(f"models, {memory}" for memory in MEMORY))


def emulate() -> None:
    """Without a GPU, use CUDA kernels built for the CPU."""
    from tests import cuda_host

    if not (torch.cuda.is_available() or cuda_host.VARIABLE in os.environ or cuda_host.missing_tools()):
        os.environ[cuda_host.VARIABLE] = str(cuda_host.build())


def kept(who: str, memory: str, use_grn: bool, c: int, size: int, n: int, dtype: str) -> float:
    """Bytes that a forward pass of one block keeps, in units of x's bytes."""
    device = "cuda" if who in EMULATED and torch.cuda.is_available() else "cpu"
    if who in (PYTORCH, COMPILED):
        block = EagerBlock(c, use_grn)
    else:
        block = FusedConvNeXtBlock(c, use_grn=use_grn, memory=memory, backend=who)
    form = {"device": device, "dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    block, x = block.to(**form), torch.randn(n, c, size, size).to(**form)
    step = Step(torch.compile(block, fullgraph=True, dynamic=False) if who == COMPILED else block, (x,))
    with quiet():
        if who == COMPILED:
            step()
        found = saved_bytes(step) / (x.numel() * x.element_size())
    torch.compiler.reset()
    return found


def blocks(quick: bool, dtypes: tuple[str, ...]) -> Table:
    """The table of *blocks*, with the least and the most over the sizes. tests/ops/test_memory.py has the limits."""
    candidates = [(PYTORCH, ""), (COMPILED, "")]
    candidates += [(name, m) for name, status in ck.list_backends().items() if status.available for m in MEMORY]
    rows = []
    for who, memory in candidates:
        print(f"{who} {memory} ...", file=sys.stderr, flush=True)
        small = who in EMULATED and not torch.cuda.is_available()
        stages, n = (SMALL, 1) if small else (STAGES, 8)
        for what, dtype in ((what, dtype) for dtype in dtypes for what in ("V1", "V2")):
            found = [kept(who, memory, what == "V2", *stage, n, dtype) for stage in stages[-1 if quick else 0 :]]
            text = "-".join(dict.fromkeys((f"{min(found):.2f}", f"{max(found):.2f}")))
            rows.append((who, memory, what, dtype, text))
    title = "kept for the gradient by a block, in units of the bytes of x: range over its sizes"
    return Table(title, ("who", "memory", "block", "dtype", "kept"), rows)


def measure_step(who: str, dtype: str, batch: int, size: int, threads: int | None) -> tuple[int, int]:
    """Bytes resident before a training step, and the largest during it: medians. In this process, a new one."""
    torch.set_num_threads(threads or torch.get_num_threads())
    if who.startswith("models"):
        model = models.create_model("convnext_tiny", memory=who.partition(", ")[2])
    else:
        from torchvision.models import convnext_tiny

        model = convnext_tiny(stochastic_depth_prob=0.0)
    initialise(model)
    form = {"dtype": torch.bfloat16 if dtype == "bf16" else torch.float32, "memory_format": torch.channels_last}
    model, x = model.train().to(**form), torch.randn(batch, 3, size, size).to(**form)
    module = WithLoss(accelerate(model) if who == "accelerate" else model, dtype == "autocast")
    module = torch.compile(module, fullgraph=True, dynamic=False) if who == COMPILED else module
    step = TrainingStep(module, (x, target_of(x, "model")))
    for _ in range(2):
        step()
    found = []
    for _ in range(3):
        step.module.zero_grad(set_to_none=True)
        before = reset_peak()
        step()
        found.append((before, resident("VmHWM")))
    before, peak = (int(statistics.median(values)) for values in zip(*found, strict=True))
    return before, peak


def steps(batch: int, size: int, dtypes: tuple[str, ...], threads: int | None) -> Table:
    """The table of *step*."""
    rows = []
    for dtype in dtypes:
        eager = None
        for who in STEPS:
            print(f"step: {who}, {dtype} ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                before, peak = pool.submit(measure_step, who, dtype, batch, size, threads).result()
            step = peak - before
            eager = eager or step  # the first one
            rows.append((who, dtype, *(f"{b / 2**20:.0f}" for b in (before, peak, step)), f"{step / eager:.0%}"))
    title = "peak resident set of a training step of ConvNeXt-T, MiB"
    return Table(title, ("who", "dtype", "before", "peak", "step", "of eager's"), rows)


@click.command(help=__doc__.splitlines()[0])
@click.argument("parts", nargs=-1, type=click.Choice(["blocks", "step"]))
@click.option("--quick", is_flag=True, help="One stage; the step at batch 2, 64x64, only to show that it works.")
@click.option("--dtype", "dtypes", type=click.Choice(["bf16", "fp32", "autocast"]), multiple=True)
@options.count("--threads", None, "CPU threads of PyTorch in a step.")
def main(parts: tuple[str, ...], quick: bool, dtypes: tuple[str, ...], threads: int | None) -> None:
    """Count, measure and print."""
    parts, dtypes = parts or ("blocks", "step"), dtypes or ("bf16", "fp32")
    if "step" in parts:
        options.show(steps(*((2, 64) if quick else (8, 224)), dtypes, threads), width=160)
    if "blocks" in parts:
        emulate()
        options.show(blocks(quick, tuple(dtype for dtype in dtypes if dtype != "autocast")), width=160)


if __name__ == "__main__":
    main()
