"""Training on a CPU compared with eager PyTorch and torch.compile.

    python benchmarks/training.py [--quick | --full] [--only PATTERN] [--dtype bf16] [--json FILE]

Three kinds of cases, at batch 8 except for volumes:

- the gradient of the weight and bias of the 7x7 depthwise convolution, called as an operator; of volumes, at batch 1
  (`--only 'dwconv3d/*'`), of all three kernels
- a training step of the block
- a training step of torchvision's ConvNeXt-T

A step is what a training loop does: drop the gradients, forward, loss (mean squared error; cross entropy for the
model), backward, optimiser. The optimiser is AdamW(fused=True) for all, PyTorch's fastest AdamW on CPUs. It is part of
the step because it changes the weights, so this package must pack them again in every step. Stochastic depth is off, so
that all candidates compute the same. "bf16": parameters and images in bf16. "autocast": fp32 parameters under
torch.autocast(bfloat16).

Measured like `convnext-kernels bench`: every candidate is first compared with fp64 (the loss and all gradients of the
first step). Only correct ones are timed, in turn, pinned, on an allocator that keeps its memory. Peers get both memory
formats; torch.compile gets model and loss in one graph.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels.bench import candidates, measure, report
from convnext_kernels.bench import cases as table
from convnext_kernels.bench.candidates import Call, Candidate, Prepared, Step
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, Case
from convnext_kernels.bench.conditions import start
from convnext_kernels.bench.results import OURS
from convnext_kernels.bench.workloads import Workload
from convnext_kernels.cli import bench, options

WEIGHT_GRADIENT, AUTOCAST = "weight-gradient", "autocast"
OPTIMISER = "AdamW(fused=True, lr=1e-3)"
# Results with a larger relative error are not timed. PyTorch's own bf16 gradients of LayerNorm's parameters are up to
# 89 % off in the first stage at batch 8 (sums over 25088 pixels). They are used in practice, so they are timed.
GARBAGE = 2.0


class WithLoss(nn.Module):
    """A model and its loss in one module, so that torch.compile gets both; autocast leaves fp64 alone."""

    def __init__(self, model: nn.Module, autocast: bool = False) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            y = self.model(x)
            return F.mse_loss(y, target) if target.is_floating_point() else F.cross_entropy(y, target)


class TrainingStep(Step):
    """A step that ends with the optimiser's, except in fp64; `gradients` are those before it."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(module, inputs)
        x, target = self.leaves
        x.requires_grad_(target.is_floating_point())  # a model's images need no gradients, unlike a block's input
        target.requires_grad_(False)
        reference = x.dtype == torch.float64
        self.optimiser = None if reference else torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def __call__(self) -> Tensor:
        loss = super().__call__()
        if self.optimiser is not None:
            self.optimiser.step()
        return loss.detach()


class Gradient(nn.Module):
    """The gradients of a depthwise convolution's weight and bias as an operator: PyTorch's, or ours."""

    def __init__(self, conv: nn.Module, ours: bool) -> None:
        super().__init__()
        self.conv, self.ours = conv, ours

    def forward(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        weight, bias, needs = self.conv.weight, self.conv.bias, [False, True, True]
        c, k, axes = x.shape[1], weight.shape[-1], x.dim() - 2
        if x.is_meta:  # to be counted: FlopCounterMode does not know groups in a backward pass
            return {"y": self.conv(x)}
        if x.dtype == torch.float64:  # the reference, whose convolution goes through FFTs
            with torch.inference_mode(False), torch.enable_grad():
                found = torch.autograd.grad(self.conv(x), (weight, bias), dy)
        elif self.ours and axes == 3:
            found = torch.ops.convnext_kernels.dwconv3d_backward(dy, x, weight, bias, 1, needs, "auto")
        elif self.ours:
            found = torch.ops.convnext_kernels.dwconv_backward(dy, x, weight, bias, 1, 1, 1, needs, "auto")
        else:
            form = ([c], [1] * axes, [k // 2] * axes, [1] * axes, False, [0] * axes, c, needs)
            found = torch.ops.aten.convolution_backward(dy, x, weight, *form)[1:]
        return dict(zip(("gradient of weight", "gradient of bias"), found, strict=True))


def target_of(x: Tensor, group: str) -> Tensor:
    """Return the target of the loss: another image for a block, classes for a model; the same numbers for all."""
    generator = torch.Generator().manual_seed(2)
    if group == "model":
        return torch.randint(1000, (len(x),), generator=generator)
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))


def build(case: Case) -> Workload:
    """The workload of a case of `bench` with a loss, or its gradients as an operator."""
    plain, autocast = case.build(), case.what.endswith(AUTOCAST)
    (x,) = plain.inputs
    if case.direction == WEIGHT_GRADIENT:
        modules = Gradient(plain.eager, False), Gradient(plain.ours, True)
    else:
        modules = WithLoss(plain.eager, autocast), WithLoss(plain.ours, autocast)
    return Workload(*modules, (x, target_of(x, case.group)), autocast)


def _with_memory(memory: str) -> Callable[[Prepared], Call]:
    def build(prepared: Prepared) -> Call:
        module, inputs = prepared.parts("ours")
        module.model.memory = memory
        return prepared.call(module, inputs)

    return build


def _in(*groups: str, quick: bool = True) -> Callable[[Case, str], bool]:
    return lambda case, mode: case.group in groups and (quick or mode != QUICK)


EVERY = ("dwconv", "dwconv3d", "block", "model")
CANDIDATES = (
    *(replace(candidate, wanted=_in(*EVERY)) for candidate in candidates.CANDIDATES[:3]),  # eager in both layouts, ours
    Candidate("torch.compile", candidates.compiled(), _in("dwconv", "block", "model")),
    Candidate("torch.compile, max-autotune", candidates.compiled(autotune=True), _in("block", quick=False)),
    Candidate("torch.compile, contiguous", candidates.compiled(contiguous=True), _in("dwconv", "block", quick=False)),
    *(Candidate(f"{OURS}, {memory}", _with_memory(memory), _in("block")) for memory in ("min", "balanced")),
)


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases, from the table of `convnext-kernels bench`, with their own names."""
    found = []
    for case in table.cases():
        if case.direction != "training" or case.batch != (1 if case.group == "dwconv3d" else 8):
            continue
        mode = QUICK if case.channels == 384 else STANDARD
        if (case.group == "dwconv" and case.kernel_size == 7) or case.group == "dwconv3d":
            mode = FULL if case.group == "dwconv3d" else mode  # PyTorch's takes up to two seconds
            found.append(replace(case, direction=WEIGHT_GRADIENT, mode=mode))
        elif case.group in ("block", "model"):
            found.append(replace(case, what=f"{case.what} step", mode=mode))
            if case.group == "model" and case.dtype == "bf16":
                found.append(replace(found[-1], what=f"{case.what} step {AUTOCAST}"))
    return tuple(replace(case, build=functools.partial(build, case)) for case in found)


def session(mode: str, candidates: tuple[Candidate, ...] = CANDIDATES) -> measure.Session:
    """What measures the cases."""
    return measure.Session("cpu", mode, {}, candidates=candidates, garbage=GARBAGE, step=TrainingStep)


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", "mode", flag_value=QUICK, help="One stage, no models, eager and torch.compile's defaults.")
@click.option("--full", "mode", flag_value=FULL, help="More rounds.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only cases with this in their name.")
@click.option("--dtype", "dtypes", type=click.Choice(["fp32", "bf16"]), multiple=True, default=("fp32", "bf16"))
@options.threads
@click.option("--json", "file", type=options.FILE, help="Write all times and their conditions here.")
def main(mode: str | None, only: tuple[str, ...], dtypes: tuple[str, ...], file: Path | None) -> None:
    """Measure and print; fails if this package is wrong or fails in a case."""
    mode = mode or STANDARD
    try:
        selected = table.select(mode, only, everything=[case for case in cases() if case.dtype in dtypes])
    except ValueError as error:
        raise click.ClickException(f"--only {error}") from error
    run = start("cpu", mode)
    run.conditions["optimiser"] = OPTIMISER
    bench.measure(run, selected, file, session(mode))
    groups = dict.fromkeys(record.group for record in run.records)
    tables = [report.candidates(run, (group,), f"{group}: ms, median (minimum)", minima=True) for group in groups]
    click.echo(f"commit {run.machine['commit']}, {run.created}; {OPTIMISER}")
    bench.finish(run, tables, width=240)


if __name__ == "__main__":
    main()
