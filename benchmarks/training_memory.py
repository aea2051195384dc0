"""Memory of training on this machine: what a block keeps for its gradient, and the peak of a whole training step.

    python benchmarks/training_memory.py [blocks] [step] [--quick] [--check]

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

import gc
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

MEMORY = ("auto", "balanced", "min")
LIMITS = {"auto": 6.1, "balanced": 6.1, "min": 2.1}  # in units of x's bytes, for every backend
PYTORCH, COMPILED = "eager PyTorch", "torch.compile"
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
EMULATED, SMALL = ("triton", "cuda"), ((96, 7), (384, 7))  # without a GPU
STEPS = (PYTORCH, COMPILED, "accelerate", *(f"models, {memory}" for memory in MEMORY))


def emulate() -> None:
    """Without a GPU, use Triton's interpreter and CUDA kernels built for the CPU. Call before importing the package."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests import cuda_host

    if cuda_host.VARIABLE not in os.environ and not cuda_host.missing_tools():
        os.environ[cuda_host.VARIABLE] = str(cuda_host.build())


def kept(who: str, memory: str, use_grn: bool, c: int, size: int, n: int, dtype: str) -> float:
    """Bytes that a forward pass of one block keeps, in units of x's bytes."""
    import torch

    from convnext_kernels import FusedConvNeXtBlock
    from convnext_kernels.bench.candidates import DTYPES, Step, quiet
    from convnext_kernels.bench.measure import saved_bytes
    from convnext_kernels.bench.workloads import EagerBlock

    device = "cuda" if who in EMULATED and torch.cuda.is_available() else "cpu"
    if who in (PYTORCH, COMPILED):
        block = EagerBlock(c, use_grn)
    else:
        block = FusedConvNeXtBlock(c, use_grn=use_grn, memory=memory, backend=who)
    form = {"device": device, "dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    block, x = block.to(**form), torch.randn(n, c, size, size).to(**form)
    step = Step(torch.compile(block, fullgraph=True, dynamic=False) if who == COMPILED else block, (x,))
    try:
        with quiet():
            if who == COMPILED:
                step()
            return saved_bytes(step) / (x.numel() * x.element_size())
    finally:
        torch._dynamo.reset()


def count(quick: bool, dtypes: tuple[str, ...]) -> list[dict]:
    """All rows of *blocks*: "kept" is the least and the most over the sizes, or None with a reason."""
    import torch

    import convnext_kernels as ck

    candidates = [(PYTORCH, ""), (COMPILED, "")]
    candidates += [(name, m) for name, status in ck.list_backends().items() if status.available for m in MEMORY]
    rows = []
    for who, memory in candidates:
        print(f"{who} {memory} ...", file=sys.stderr, flush=True)
        small = who in EMULATED and not torch.cuda.is_available()
        stages, n = (SMALL, 1) if small else (STAGES, 8)
        for what, dtype in ((what, dtype) for dtype in dtypes for what in ("V1", "V2")):
            row = {"who": who, "memory": memory, "what": what, "dtype": dtype, "limit": LIMITS.get(memory)}
            try:
                found = [kept(who, memory, what == "V2", *stage, n, dtype) for stage in stages[-1 if quick else 0 :]]
                rows.append(row | {"kept": (min(found), max(found)), "reason": ""})
            except Exception as error:
                rows.append(row | {"kept": None, "reason": f"{type(error).__name__}: {error}"})
    return rows


def exceeds(row: dict) -> bool:
    return row["limit"] is not None and (row["kept"] is None or not row["kept"][1] <= row["limit"])


def resident(name: str = "VmRSS") -> int:
    """Return the bytes of this process that are resident now (VmRSS) or the largest so far (VmHWM)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE).group(1)) * 1024


def reset_peak() -> int:
    """Return freed memory to the system and reset VmHWM to what is resident now; returns that."""
    from convnext_kernels.bench.timing import glibc

    gc.collect()
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def measure_step(who: str, dtype: str, batch: int, size: int, steps: int) -> dict:
    """Bytes resident before a training step, and the largest during it: medians. In this process, a new one."""
    import torch
    from training import TrainingStep, WithLoss, target_of

    from convnext_kernels import accelerate, models
    from convnext_kernels.bench.workloads import initialise

    if who.startswith("models"):
        model = models.create_model("convnext_tiny", memory=who.partition(", ")[2])
    else:
        from torchvision.models import convnext_tiny

        model = convnext_tiny(stochastic_depth_prob=0.0)
    initialise(model)
    form = {"dtype": torch.bfloat16 if dtype == "bf16" else torch.float32, "memory_format": torch.channels_last}
    model, x = model.train().to(**form), torch.randn(batch, 3, size, size).to(**form)
    module = WithLoss(accelerate(model) if who == "accelerate" else model)
    module = torch.compile(module, fullgraph=True, dynamic=False) if who == COMPILED else module
    step = TrainingStep(module, x, target_of(x, "model"), dtype == "autocast")
    for _ in range(2):
        step()
    found = []
    for _ in range(steps):
        step.module.zero_grad(set_to_none=True)
        before = reset_peak()
        step()
        found.append((before, resident("VmHWM")))
    before, peak = (int(statistics.median(values)) for values in zip(*found, strict=True))
    return {"who": who, "dtype": dtype, "before": before, "peak": peak}


def in_a_process(who: str, dtype: str, batch: int, size: int, steps: int, threads: int | None) -> dict | str:
    """Run `measure_step` in a new process; return the last line of its error output if it fails."""
    arguments = json.dumps([who, dtype, batch, size, steps])
    command = [sys.executable, __file__, "--child", arguments]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict], peaks: list[dict]) -> None:
    """Print both tables."""
    from convnext_kernels.bench.tables import Table
    from convnext_kernels.cli import options

    title, found = "kept for the gradient by a block, in units of the bytes of x: range over its sizes", []
    for row in rows:
        kept = "failed" if row["kept"] is None else "-".join(dict.fromkeys(f"{value:.2f}" for value in row["kept"]))
        verdict = "" if row["limit"] is None else "EXCEEDED" if exceeds(row) else "met"
        what = (row["who"], row["memory"], row["what"], row["dtype"])
        found.append((*what, kept, "" if row["limit"] is None else f"at most {row['limit']:g}", verdict, row["reason"]))
    if rows:
        options.show(Table(title, ("who", "memory", "block", "dtype", "kept", "limit", "", ""), found), width=160)
    found, eager = [], {p["dtype"]: p["peak"] - p["before"] for p in peaks if p["who"] == PYTORCH}
    for p in peaks:
        step, base = p["peak"] - p["before"], eager.get(p["dtype"])
        mib = (f"{value / 2**20:.0f}" for value in (p["before"], p["peak"], step))
        found.append((p["who"], p["dtype"], *mib, f"{step / base:.0%}" if base else ""))
    if peaks:
        title = "peak resident set of a training step of ConvNeXt-T, MiB"
        options.show(Table(title, ("who", "dtype", "before", "peak", "step", "of eager's"), found), width=160)


@click.command(help=__doc__.splitlines()[0])
@click.argument("parts", nargs=-1, type=click.Choice(["blocks", "step"]))
@click.option("--quick", is_flag=True, help="One stage; the step at batch 2, 64x64, only to show that it works.")
@click.option("--dtype", "dtypes", type=click.Choice(["bf16", "fp32", "autocast"]), multiple=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: PyTorch's]")
@click.option("--check", is_flag=True, help="Fail if a block keeps more than its limit.")
@click.option("--child", hidden=True)
def main(
    parts: tuple[str, ...],
    quick: bool,
    dtypes: tuple[str, ...],
    threads: int | None,
    check: bool,
    child: str | None,
) -> None:
    """Count, measure, print and check."""
    if child:
        import torch

        if threads:
            torch.set_num_threads(threads)
        print(json.dumps(measure_step(*json.loads(child))))
        return
    parts, dtypes = parts or ("blocks", "step"), dtypes or ("bf16", "fp32")
    rows, peaks, failures = [], [], []
    if "step" in parts:
        for dtype in dtypes:
            for who in STEPS:
                print(f"step: {who}, {dtype} ...", file=sys.stderr, flush=True)
                found = in_a_process(who, dtype, *((2, 64) if quick else (8, 224)), 3, threads)
                peaks += [found] if isinstance(found, dict) else []
                failures += [] if isinstance(found, dict) else [f"{who}, {dtype}: {found}"]
    if "blocks" in parts:
        emulate()
        rows = count(quick, tuple(dtype for dtype in dtypes if dtype != "autocast"))
    show(rows, peaks)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(1 if failures or (check and any(map(exceeds, rows))) else 0)


if __name__ == "__main__":
    main()
