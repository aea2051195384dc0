"""Training on a CPU against its peers: weight gradient, block, whole model; and what is kept for the backward pass.

    python benchmarks/training.py speed [--quick] [--only TEXT] [--json FILE]
    python benchmarks/training.py memory [--quick] [--check]

`speed` times whole training steps: gradients dropped, forward, backward and optimiser, so that our packed weights are
packed again for each. Everybody gets the same numbers, threads, pinning and allocator, and takes turns
(bench/timing.py); a candidate whose gradients are wrong against fp64 gets no time. Peers: eager in both memory formats,
torch.compile.

`memory` counts the bytes that one block keeps between forward and backward, in units of its input, and takes the peak
of the resident memory of a process that trains ConvNeXt-T, beyond that of one that has only built it.
"""

import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

# Without a GPU Triton's kernels run in its interpreter, which must be known before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from convnext_kernels import FusedConvNeXtBlock, accelerate, backends, environment
from convnext_kernels.bench import conditions, measure, work, workloads
from convnext_kernels.bench.candidates import Step, quiet
from convnext_kernels.bench.cases import STAGES
from convnext_kernels.bench.numerics import PEER_SLACK, relative_errors
from convnext_kernels.bench.timing import interleave, pinned, steady_allocator

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH = 8
OURS, EAGER = "convnext_kernels", "eager"
ASKED = {  # times as fast as the best peer
    ("weight gradient", "bf16"): 20.0,
    ("weight gradient", "fp32"): 5.0,
    ("block", "bf16"): 2.5,
    ("block", "fp32"): 1.3,
    ("model", "bf16"): 2.0,
}
LIMITS = {"min": 2.1, "balanced": 6.1, "auto": 6.1}  # times the bytes of x

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """What is timed, and how: `build` returns the candidates that were right, and why others were not."""

    kind: str
    what: str
    dtype: str
    build: Callable[[], tuple[Calls, dict[str, str]]]

    @property
    def name(self) -> str:
        """For the table and for --only."""
        return f"{self.kind} {self.what} {self.dtype}"


class TrainingStep:
    """Drop gradients, forward, loss, backward, optimiser."""

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module], Tensor], parameters: list[nn.Parameter]) -> None:
        self.module, self.loss = module, loss
        # Steps too small to change the weights' magnitude, and large enough to change their bits.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, foreach=True)

    def __call__(self) -> None:
        """Run one step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.module).backward()
        self.optimizer.step()


def _nhwc(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _judged(calls: dict[str, Step], reference: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Why candidates are wrong; eager in channels_last sets the standard."""
    errors = {name: relative_errors(reference, measure.results(call)) for name, call in calls.items()}
    wrong = {}
    for name, found in errors.items():
        standard = None if name == EAGER else errors[EAGER]
        judgement = measure.judge_beside(standard, found, dtype, 1 if name.startswith(OURS) else PEER_SLACK)
        if not judgement.within:
            wrong[name] = f"{judgement.tensor}: error {judgement.error:.2e}, allowed {judgement.allowed:.2e}"
    return wrong


def _compiled(module: nn.Module) -> nn.Module:
    return torch.compile(copy.deepcopy(module), dynamic=False)


def weight_gradient(channels: int, size: int, dtype: torch.dtype) -> tuple[Calls, dict[str, str]]:
    """The gradients of a 7x7 depthwise convolution's weight and bias."""
    x, dy = (_nhwc(BATCH, channels, size, size, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = torch.randn(channels, 1, 7, 7).to(dtype)
    bias = torch.randn(channels).to(dtype)
    mask = [False, True, True]

    def library(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        convolution = torch.ops.aten.convolution_backward
        return convolution(dy, x, weight, [channels], [1, 1], [3, 3], [1, 1], False, [0, 0], channels, mask)[1:]

    ours = torch.ops.convnext_kernels.dwconv_backward
    compiled = torch.compile(library, dynamic=False)
    contiguous = dy.contiguous(), x.contiguous()
    calls: Calls = {
        OURS: partial(ours, dy, x, weight, bias, 1, mask, "cpu"),
        EAGER: partial(library, dy, x, weight),
        "eager, contiguous": partial(library, *contiguous, weight),
        "torch.compile": partial(compiled, dy, x, weight),
    }
    reference = library(contiguous[0].double(), contiguous[1].double(), weight.double())
    wrong = {}
    with quiet():
        for name, call in calls.items():
            for truth, found in zip(reference, call(), strict=True):
                error = ((found.double() - truth).abs().max() / truth.abs().max()).item()
                if not error <= 8 * torch.finfo(dtype).eps * (1 if name == OURS else PEER_SLACK):
                    wrong[name] = f"error {error:.2e}"
    return calls, wrong


def block(channels: int, size: int, grn: bool, dtype: torch.dtype) -> tuple[Calls, dict[str, str]]:
    """A training step of one block."""
    workload = workloads.block(work.block(BATCH, channels, size, grn), BATCH, channels, size, size, grn)
    eager = workload.eager.to(dtype).to(memory_format=torch.channels_last)
    inputs = tuple(x.to(dtype).contiguous(memory_format=torch.channels_last) for x in workload.inputs)
    modules = {EAGER: eager, "torch.compile": _compiled(eager)}
    for memory in LIMITS:
        fused = FusedConvNeXtBlock(channels, use_grn=grn, memory=memory, dtype=dtype)
        fused.load_state_dict(eager.state_dict())
        modules[OURS if memory == "auto" else f"{OURS}, {memory}"] = fused.to(memory_format=torch.channels_last)
    steps = {name: Step(module, inputs) for name, module in modules.items()}
    plain = copy.deepcopy(eager).to(memory_format=torch.contiguous_format)
    steps["eager, contiguous"] = Step(plain, tuple(x.contiguous() for x in inputs))
    truth = measure.results(Step(workloads.reference(eager), tuple(x.double().contiguous() for x in inputs)))
    with quiet():
        wrong = _judged(steps, truth, dtype)

    def loss(module: nn.Module, step: Step) -> Tensor:
        return (module(*step.leaves) * step.gradient).sum()

    calls: Calls = {}
    for name, step in steps.items():
        calls[name] = TrainingStep(step.module, partial(loss, step=step), list(step.module.parameters()))
    return calls, wrong


def _tiny(dtype: torch.dtype) -> nn.Module:
    import torchvision

    model = torchvision.models.convnext_tiny(stochastic_depth_prob=0.0)
    workloads.initialise(model)
    return model.to(dtype).to(memory_format=torch.channels_last).train()


def model(dtype: torch.dtype, autocast: bool, batch: int = BATCH) -> tuple[Calls, dict[str, str]]:
    """A training step of torchvision's ConvNeXt-T at 224, cross entropy; `autocast`: bf16 over fp32 parameters."""
    x, target = _nhwc(batch, 3, 224, 224, dtype=dtype, seed=0), torch.arange(batch)

    def loss(module: nn.Module, x: Tensor = x) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return nn.functional.cross_entropy(module(x).float(), target)

    eager = _tiny(dtype)
    plain = copy.deepcopy(eager).to(memory_format=torch.contiguous_format)
    modules = {OURS: accelerate(copy.deepcopy(eager)), EAGER: eager, "torch.compile": _compiled(eager)}
    calls: Calls = {n: TrainingStep(m, loss, list(m.parameters())) for n, m in modules.items()}
    calls["eager, contiguous"] = TrainingStep(plain, partial(loss, x=x.contiguous()), list(plain.parameters()))
    # The norm of all gradients; `convnext-kernels verify` looks at every kernel.
    norms, wrong = {}, {}
    with quiet():
        for name, call in calls.items():
            call()
            norms[name] = nn.utils.get_total_norm([p.grad.float() for p in call.module.parameters()]).item()
    for name, norm in norms.items():
        if not abs(norm / norms[EAGER] - 1) < (0.1 if dtype == torch.bfloat16 or autocast else 1e-3):
            wrong[name] = f"the norm of all gradients is {norm:.4g}, eager's {norms[EAGER]:.4g}"
    return calls, wrong


def cases(quick: bool) -> Iterator[Case]:
    """Cheap ones first."""
    stages = STAGES[2:3] if quick else STAGES
    for dtype, kind in DTYPES.items():
        for c, size in stages:
            yield Case("weight gradient", f"C{c} {size}x{size}", dtype, partial(weight_gradient, c, size, kind))
    for dtype, kind in DTYPES.items():
        for c, size in stages:
            for grn in (False, True):
                what = f"{'V2' if grn else 'V1'} C{c} {size}x{size}"
                yield Case("block", what, dtype, partial(block, c, size, grn, kind))
    if not quick:
        for dtype, kind in DTYPES.items():
            yield Case("model", "ConvNeXt-T 224", dtype, partial(model, kind, False))
        yield Case("model", "ConvNeXt-T 224, autocast", "bf16", partial(model, torch.float32, True))


@click.group()
def main() -> None:
    """Training on a CPU against its peers."""


@main.command()
@click.option("--quick", is_flag=True, help="One stage, three rounds: whether it runs, not how fast.")
@click.option("--only", default="", help="Cases whose name holds this.")
@click.option("--json", "file", type=click.Path(dir_okay=False, writable=True), help="Keep all times.")
def speed(quick: bool, only: str, file: str | None) -> None:
    """Time training steps; a row says how many times as fast as the best peer, and what was asked."""
    console = Console(width=200)
    place = conditions.collect("cpu")
    for warning in place["warnings"]:
        console.print(f"warning: {warning}")
    rows = []
    for case in [c for c in cases(quick) if only in c.name]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        calls, wrong = case.build()
        right = {name: call for name, call in calls.items() if name not in wrong}
        with steady_allocator(), pinned():
            times = interleave(right, rounds=3 if quick else 9, bursts=True, training=True)
        peers = {name: t for name, t in times.items() if not name.startswith(OURS)}
        row = {"case": case.name, "asked": ASKED.get((case.kind, case.dtype)), "wrong": wrong}
        row["times_ms"] = {name: {"minimum": t.minimum, "median": t.median} for name, t in times.items()}
        if OURS in times and peers:
            best = min(peers, key=lambda name: peers[name].median)
            row["best_peer"], row["factor"] = best, peers[best].median / times[OURS].median
        rows.append(row)
        asked = f", asked {row['asked']:g}x" if row["asked"] else ""
        factor = f"{row['factor']:.2f}x the best peer ({row['best_peer']}){asked}" if "factor" in row else "no factor"
        console.print(f"{case.name}, batch {BATCH}: {factor}")
        for name, t in times.items():
            console.print(f"    {name}: median {t.median:.3f} ms, minimum {t.minimum:.3f} ms")
        for name, reason in wrong.items():
            console.print(f"    {name}: no time, {reason}")
        sys.stdout.flush()
    if not rows:
        raise click.UsageError(f"--only {only!r}: no case has this in its name")
    if file:
        with open(file, "w") as out:
            found = {"conditions": place, "environment": environment.collect(), "rows": rows}
            json.dump(found, out, indent=1, default=str)
    console.print(f"training speed: {len(rows)} cases, {sum(bool(r['wrong']) for r in rows)} with a wrong candidate")
    if any(name.startswith(OURS) for row in rows for name in row["wrong"]):
        raise SystemExit(1)


def _kept(module: nn.Module, x: Tensor) -> float:
    """Bytes that ``module(x)`` keeps for its gradient beside the parameters, in units of x; x itself counts."""
    step = Step(module, (x,))
    with quiet():
        step()  # compiles; of a compiled module the graph's own saved tensors are seen by the hooks as well
        return measure.saved_bytes(step) / (x.numel() * x.element_size())


def _peak(which: str, dtype: str, batch: int, steps: int) -> float:
    """MiB of resident memory at its peak, in a process of its own, beyond a process that builds the model alone."""
    peaks = []
    for taken in (0, steps):
        command = [sys.executable, __file__, "train", which, dtype, str(batch), str(taken)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{which}: {done.stderr.strip().splitlines()[-1]}")
        peaks.append(int(done.stdout.split()[-1]))
    return (peaks[1] - peaks[0]) / 1024


@main.command(hidden=True)
@click.argument("which")
@click.argument("dtype")
@click.argument("batch", type=int)
@click.argument("steps", type=int)
def train(which: str, dtype: str, batch: int, steps: int) -> None:
    """Train for some steps and print the peak of the resident memory in KiB."""
    net, x = _tiny(DTYPES[dtype]), _nhwc(batch, 3, 224, 224, dtype=DTYPES[dtype], seed=0)
    if which == "torch.compile":
        net = torch.compile(net, dynamic=False)
    elif which != EAGER:
        accelerate(net)
        for module in net.modules():
            if hasattr(module, "memory"):
                module.memory = which
    target = torch.arange(batch)
    step = TrainingStep(net, lambda m: nn.functional.cross_entropy(m(x).float(), target), list(net.parameters()))
    for _ in range(steps):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@main.command()
@click.option("--quick", is_flag=True, help="Blocks only.")
@click.option("--check", is_flag=True, help="Fail where a block keeps more than asked.")
def memory(quick: bool, check: bool) -> None:
    """Count what blocks keep for the gradient, and take the peak memory of training ConvNeXt-T."""
    console = Console(width=160)
    title = "kept for the backward pass, times the bytes of x"
    table = Table("block, bf16", "backend", "memory", "kept", "asked", title=title)
    over = 0
    for grn in (False, True):
        version, channels = ("V2" if grn else "V1"), 208
        x = _nhwc(2, channels, 14, 14, dtype=torch.bfloat16, seed=0)
        eager = workloads.EagerBlock(channels, grn).bfloat16()
        for name, module in ((EAGER, eager), ("torch.compile", _compiled(eager))):
            table.add_row(version, name, "", f"{_kept(module, x):.2f}", "")
        for backend, status in backends().items():
            if not status.available:
                table.add_row(version, backend, "", f"not available: {status.reason}", "")
                continue
            for setting, limit in LIMITS.items():
                fused = FusedConvNeXtBlock(channels, use_grn=grn, memory=setting, backend=backend, dtype=torch.bfloat16)
                kept = _kept(fused, x)
                over += kept > limit
                table.add_row(version, backend, setting, f"{kept:.2f}", f"at most {limit:g}")
    console.print(table)
    if not quick:
        title = "peak resident memory of training, beyond the model's own, MiB"
        peak = Table("ConvNeXt-T 224, batch 8", *DTYPES, title=title)
        for which in (EAGER, "torch.compile", *LIMITS):
            named = f"accelerated, {which}" if which in LIMITS else which
            peak.add_row(named, *[f"{_peak(which, dtype, BATCH, 3):.0f}" for dtype in DTYPES])
        console.print(peak)
    console.print(f"training memory: {over} of {table.row_count} rows over what was asked")
    if check and over:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
