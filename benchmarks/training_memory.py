"""Memory of training on this machine: what a block keeps for its gradient, and the peak of a whole training step.

    python benchmarks/training_memory.py [blocks] [step] [--quick] [--json FILE] [--check]

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
gradients and temporaries. "over model" is the peak minus what was resident once model, images and optimiser existed:
it also includes the optimiser's state, packed weights and code loaded by the first steps, for torch.compile the
compiler. The row "accelerate" is torchvision's ConvNeXt-T, the rows with a setting of `memory` are this package's own.
"""

import dataclasses
import gc
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

BLOCKS, STEP = "blocks", "step"
MEMORY = ("auto", "balanced", "min")
LIMITS = {"auto": 6.1, "balanced": 6.1, "min": 2.1}  # in units of x's bytes, for every backend
PEERS_KEEP = 12.02  # counted by hand for eager and torch.compile (V1)
PYTORCH, COMPILED = "eager PyTorch", "torch.compile"
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
EMULATED = ("triton", "cuda")  # without a GPU
SMALL = ((96, 7), (384, 7))
STEPS = (PYTORCH, COMPILED, "accelerate", *(f"models, {memory}" for memory in MEMORY))
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that a block keeps, in units of x's bytes."""

    who: str  # eager PyTorch, torch.compile or a backend of this package
    memory: str  # of this package; else ""
    variant: str  # V1 or V2
    what: str
    dtype: str
    kept: float | None  # None: it failed
    reason: str = ""

    @property
    def limit(self) -> float | None:
        return LIMITS.get(self.memory)

    @property
    def exceeds(self) -> bool:
        return self.limit is not None and (self.kept is None or not self.kept <= self.limit)


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of a training step: medians over steps."""

    who: str
    dtype: str
    loaded: int  # resident after the model was loaded
    before: int  # resident before the step
    peak: int  # largest during the step


def emulate() -> None:
    """Without a GPU, use Triton's interpreter and CUDA kernels built for the CPU. Call before importing the package."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests import cuda_host

    if cuda_host.VARIABLE not in os.environ and not cuda_host.missing_tools():
        os.environ[cuda_host.VARIABLE] = str(cuda_host.build())


def candidates(quick: bool) -> list[tuple[str, str, tuple[tuple[int, int], ...], int]]:
    """Return (who, memory, stages, batch) of all candidates of *blocks*."""
    import torch

    import convnext_kernels as ck

    stages = STAGES[2:3] if quick else STAGES
    found = [(PYTORCH, "", stages, 8), (COMPILED, "", stages, 8)]
    for name, status in ck.list_backends().items():
        small = name in EMULATED and not torch.cuda.is_available()
        if status.available:
            sizes = (SMALL[-1:] if quick else SMALL, 1) if small else (stages, 8)
            found += [(name, memory, *sizes) for memory in MEMORY]
    return found


def kept(who: str, memory: str, use_grn: bool, c: int, size: int, n: int, dtype: str) -> Kept:
    """Run a forward pass of one block and count the kept bytes."""
    import torch

    from convnext_kernels import FusedConvNeXtBlock
    from convnext_kernels.bench.candidates import DTYPES, Step, quiet
    from convnext_kernels.bench.measure import one_line, saved_bytes
    from convnext_kernels.bench.workloads import EagerBlock

    names = (who, memory, "V2" if use_grn else "V1", f"C{c} {size}x{size} b{n}", dtype)
    device = "cuda" if who in EMULATED and torch.cuda.is_available() else "cpu"
    try:
        if who in (PYTORCH, COMPILED):
            block = EagerBlock(c, use_grn)
        else:
            block = FusedConvNeXtBlock(c, use_grn=use_grn, memory=memory, backend=who)
        block = block.to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)
        if who == COMPILED:
            block = torch.compile(block, fullgraph=True, dynamic=False)
        x = torch.randn(n, c, size, size).to(device, DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
        step = Step(block, (x,))
        with quiet():
            if who == COMPILED:
                step()
            return Kept(*names, saved_bytes(step) / (x.numel() * x.element_size()))
    except Exception as error:
        return Kept(*names, None, one_line(error))
    finally:
        torch._dynamo.reset()


def count(quick: bool, dtypes: tuple[str, ...]) -> list[Kept]:
    """Return all rows of *blocks*."""
    found = []
    for who, memory, stages, n in candidates(quick):
        print(f"{who} {memory} ...", file=sys.stderr, flush=True)
        for dtype in dtypes:
            for use_grn in (False, True):
                found += [kept(who, memory, use_grn, c, size, n, dtype) for c, size in stages]
    return found


def status_bytes(text: str, name: str) -> int:
    """Return a value of /proc/self/status."""
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE).group(1)) * 1024


def resident(name: str = "VmRSS") -> int:
    """Return the bytes of this process that are resident now (VmRSS) or the largest so far (VmHWM)."""
    return status_bytes(Path("/proc/self/status").read_text(), name)


def tidy() -> None:
    """Return freed memory to the system."""
    from convnext_kernels.bench.timing import glibc

    gc.collect()
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def reset_peak() -> None:
    """Reset VmHWM to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def model_step(who: str, dtype: str, batch: int, size: int) -> "object":
    """Return the training step of a whole model: a callable with `module`."""
    import torch
    from training import TrainingStep, WithLoss, target_of

    from convnext_kernels import accelerate, models
    from convnext_kernels.bench.workloads import initialise
    from convnext_kernels.cli.options import need

    if who.startswith("models"):
        model = models.create_model("convnext_tiny", memory=who.partition(", ")[2])
    else:
        torchvision = need("torchvision", "a whole model", "bench")
        model = torchvision.models.convnext_tiny(stochastic_depth_prob=0.0)
    initialise(model)
    autocast = dtype == "autocast"
    element = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = model.train().to(element).to(memory_format=torch.channels_last)
    if who == "accelerate":
        model = accelerate(model)
    module = WithLoss(model)
    if who == COMPILED:
        module = torch.compile(module, fullgraph=True, dynamic=False)
    x = torch.randn(batch, 3, size, size).to(element).contiguous(memory_format=torch.channels_last)
    return TrainingStep(module, x, target_of(x, "model"), autocast)


def measure_step(who: str, dtype: str, batch: int, size: int, steps: int) -> Peak:
    """Measure in this process, which should be a new one."""
    step = model_step(who, dtype, batch, size)
    step.first.clear()  # the copy of the first weights, which no training loop has
    tidy()
    loaded = resident()
    for _ in range(2):
        step()
    found = []
    for _ in range(steps):
        step.module.zero_grad(set_to_none=True)
        tidy()
        reset_peak()
        before = resident()
        step()
        found.append((before, resident("VmHWM")))
    before, peak = (int(statistics.median(values)) for values in zip(*found, strict=True))
    return Peak(who, dtype, loaded, before, peak)


def in_a_process(who: str, dtype: str, batch: int, size: int, steps: int, threads: int | None) -> Peak | str:
    """Run `measure_step` in a new process; return the last line of its error output if it fails."""
    arguments = json.dumps([who, dtype, batch, size, steps])
    command = [sys.executable, __file__, "--child", arguments]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def show_blocks(rows: list[Kept]) -> list[Kept]:
    """Print what blocks keep; return the rows that exceed their limit."""
    from training import console, make_table

    whats = list(dict.fromkeys((row.variant, row.dtype) for row in rows))
    title = "kept for the gradient by a block, in units of the bytes of x (x included): range over its sizes"
    shown = make_table(title, "who", "memory", *(f"{v} {d}" for v, d in whats), "limit", "")
    for who, memory in dict.fromkeys((row.who, row.memory) for row in rows):
        mine = [row for row in rows if (row.who, row.memory) == (who, memory)]
        cells = []
        for what in whats:
            values = [row.kept for row in mine if (row.variant, row.dtype) == what]
            least, most = (None, None) if None in values else (min(values), max(values))
            cells.append(
                "failed" if least is None else f"{most:.2f}" if most - least < 0.005 else f"{least:.2f}-{most:.2f}"
            )
        verdict = "" if mine[0].limit is None else "EXCEEDED" if any(row.exceeds for row in mine) else "met"
        limit = f"at most {mine[0].limit:g}" if mine[0].limit else f"(expected for V1: {PEERS_KEEP:g})"
        shown.add_row(who, memory, *cells, limit, verdict)
    console().print(shown, highlight=False)
    for row in rows:
        if row.kept is None:
            print(f"{row.who} {row.memory} {row.variant} {row.what} {row.dtype}: {row.reason}")
    return [row for row in rows if row.exceeds]


def show_steps(peaks: list[Peak], what: str) -> None:
    """Print peaks of whole training steps."""
    from training import console, make_table

    title = f"peak resident set of a training step, {what}, MiB"
    shown = make_table(
        title, "who", "dtype", "model", "before", "peak", "step", "of eager's", "over model", "of eager's"
    )
    eager = {peak.dtype: peak for peak in peaks if peak.who == PYTORCH}
    for p in peaks:
        base, cells = eager.get(p.dtype), []
        for growth, of in ((p.peak - p.before, "before"), (p.peak - p.loaded, "loaded")):
            cells += [f"{growth / MIB:.0f}", f"{growth / (base.peak - getattr(base, of)):.0%}" if base else ""]
        shown.add_row(p.who, p.dtype, *(f"{v / MIB:.0f}" for v in (p.loaded, p.before, p.peak)), *cells)
    console().print(shown, highlight=False)


@click.command(help=__doc__.splitlines()[0])
@click.argument("parts", nargs=-1, type=click.Choice([BLOCKS, STEP]))
@click.option("--quick", is_flag=True, help="One stage; the step at batch 2, 64x64, only to show that it works.")
@click.option("--only", multiple=True, metavar="WHO", help="Candidates of the step with this in their name.")
@click.option("--dtype", "dtypes", type=click.Choice(["bf16", "fp32", "autocast"]), multiple=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: PyTorch's]")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all figures and their conditions here.")
@click.option("--check", is_flag=True, help="Fail if a block keeps more than its limit.")
@click.option("--child", hidden=True)
def main(
    parts: tuple[str, ...],
    quick: bool,
    only: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    file: Path | None,
    check: bool,
    child: str | None,
) -> None:
    """Count, measure, print and check."""
    if child:
        import torch

        if threads:
            torch.set_num_threads(threads)
        print(json.dumps(dataclasses.asdict(measure_step(*json.loads(child)))))
        return
    parts = parts or (BLOCKS, STEP)
    dtypes = dtypes or ("bf16", "fp32")
    rows: list[Kept] = []
    peaks: list[Peak] = []
    failures: dict[str, str] = {}
    batch, size = (2, 64) if quick else (8, 224)
    if STEP in parts:
        for dtype in dtypes:
            for who in (name for name in STEPS if not only or any(pattern in name for pattern in only)):
                print(f"step: {who}, {dtype} ...", file=sys.stderr, flush=True)
                found = in_a_process(who, dtype, batch, size, 3, threads)
                if isinstance(found, Peak):
                    peaks.append(found)
                else:
                    failures[f"{who}, {dtype}"] = found
    if BLOCKS in parts:
        emulate()
        rows = count(quick, tuple(dtype for dtype in dtypes if dtype != "autocast"))
    what = f"ConvNeXt-T, batch {batch}, {size}x{size}"
    exceeded = show_blocks(rows) if rows else []
    if peaks:
        show_steps(peaks, what)
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if file is not None:
        write(file, what, rows, peaks, failures, threads)
    if rows:
        print(f"{sum(row.limit is not None for row in rows)} blocks with a limit, {len(exceeded)} exceed it")
    sys.exit(1 if failures or (check and exceeded) else 0)


def write(
    file: Path, what: str, rows: list[Kept], peaks: list[Peak], failures: dict[str, str], threads: int | None
) -> None:
    """Write everything as JSON, with the machine."""
    import datetime

    import torch

    from convnext_kernels import environment
    from convnext_kernels.bench.results import write_atomically

    machine = environment.collect() | {"commit": environment.commit()}
    machine["threads"]["torch"] = threads or torch.get_num_threads()
    values = {
        "machine": machine,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "limits": LIMITS,
        "blocks": [dataclasses.asdict(row) for row in rows],
        "step": {"what": what, "peaks": [dataclasses.asdict(peak) for peak in peaks], "failures": failures},
    }
    write_atomically(file, json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
