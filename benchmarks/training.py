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

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels.bench import candidates, report, workloads
from convnext_kernels.bench import cases as table
from convnext_kernels.bench.candidates import Call, Candidate, Prepared, Step
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, Case
from convnext_kernels.bench.conditions import start
from convnext_kernels.bench.measure import Session
from convnext_kernels.bench.results import EAGER, OURS, Run
from convnext_kernels.cli import bench, options

WEIGHT_GRADIENT, AUTOCAST = "weight-gradient", "autocast"
OPTIMISER = "AdamW(fused=True, lr=1e-3)"
# Results with a larger relative error are not timed. PyTorch's own bf16 gradients of LayerNorm's parameters are up to
# 89 % off in the first stage at batch 8 (sums over 25088 pixels). They are used in practice, so they are timed.
GARBAGE = 2.0


class WithLoss(nn.Module):
    """A model and its loss in one module, so that torch.compile gets both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.model(x)
        return F.mse_loss(y, target) if y.ndim == 4 else F.cross_entropy(y, target)


class TrainingStep(Step):
    """One step of a training loop; returns the loss. `module` takes images and targets, like `WithLoss`."""

    def __init__(
        self, module: nn.Module, x: Tensor, target: Tensor, autocast: bool = False, train: bool = True
    ) -> None:
        super().__init__(module, (x,))
        if target.ndim == 1:  # a model: its images need no gradients, unlike a block's input
            self.leaves[0].requires_grad_(False)
        self.target, self.autocast = target, autocast
        # The same one for all candidates.
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True) if train else None

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return self.module(*self.leaves, self.target)

    def __call__(self) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        self.leaves[0].grad = None
        loss = self.forward()
        loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {name: g for name, g in super().gradients().items() if g is not None}


class Gradient(nn.Module):
    """The gradients of a depthwise convolution's weight and bias as an operator: PyTorch's, or ours."""

    def __init__(self, conv: nn.Module, ours: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.ours = conv.weight, conv.bias, ours

    def forward(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        c, k, axes, needs = x.shape[1], self.weight.shape[-1], x.dim() - 2, [False, True, True]
        if self.ours and axes == 3:
            found = torch.ops.convnext_kernels.dwconv3d_backward(dy, x, self.weight, self.bias, 1, needs, "auto")
        elif self.ours:
            found = torch.ops.convnext_kernels.dwconv_backward(dy, x, self.weight, self.bias, 1, 1, 1, needs, "auto")
        else:
            ones, zeros = [1] * axes, [0] * axes
            form = ([c], ones, [k // 2] * axes, ones, False, zeros, c, needs)
            found = torch.ops.aten.convolution_backward(dy, x, self.weight, *form)[1:]
        return dict(zip(("gradient of weight", "gradient of bias"), found, strict=True))


def target_of(x: Tensor, group: str) -> Tensor:
    """Return the target of the loss: another image for a block, classes for a model; the same numbers for all."""
    generator = torch.Generator().manual_seed(2)
    if group == "model":
        return torch.randint(1000, (len(x),), generator=generator)
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))


def is_autocast(case: Case) -> bool:
    return case.what.endswith(AUTOCAST)


class TrainingPrepared(Prepared):
    """A step, or a call of the gradient, in the place of a call of the module."""

    def module(self, which: str) -> nn.Module:
        module = super().module(which)  # a copy: steps change the weights, and the next candidate starts from the same
        return Gradient(module, which == "ours") if self.case.direction == WEIGHT_GRADIENT else WithLoss(module)

    def call(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
        (x,) = inputs
        target = target_of(x, self.case.group)
        if self.case.direction == WEIGHT_GRADIENT:
            return lambda: module(x, target)
        return TrainingStep(module, x, target, is_autocast(self.case))


def _wanted(*groups: str, quick: bool = True) -> Callable[[Case, str], bool]:
    return lambda case, mode: case.group in groups and (quick or mode != QUICK)


WANTED = {
    EAGER: _wanted("dwconv", "dwconv3d", "block", "model"),
    OURS: _wanted("dwconv", "dwconv3d", "block", "model"),
    "eager, contiguous": _wanted("dwconv", "dwconv3d", "block", "model"),
    "torch.compile": _wanted("dwconv", "block", "model"),
    "torch.compile, max-autotune": _wanted("block", quick=False),
}


def _with_memory(memory: str) -> Callable[[Prepared], Call]:
    def build(prepared: Prepared) -> Call:
        module = prepared.module("ours")
        module.model.memory = memory
        return prepared.call(module, prepared.inputs)

    return build


CANDIDATES = (
    *(dataclasses.replace(c, wanted=WANTED[c.name]) for c in candidates.CANDIDATES if c.name in WANTED),
    Candidate(
        "torch.compile, contiguous", candidates.compiled(contiguous=True), _wanted("dwconv", "block", quick=False)
    ),
    *(Candidate(f"{OURS}, {memory}", _with_memory(memory), _wanted("block")) for memory in ("min", "balanced")),
)


class TrainingSession(Session):
    """Measures the cases below."""

    def prepare(self, case: Case) -> Prepared:
        found = super().prepare(dataclasses.replace(case, dtype="fp32") if is_autocast(case) else case)
        return TrainingPrepared(case, found.eager, found.ours, found.inputs, found.device)

    def reference(self, prepared: Prepared) -> dict[str, Tensor]:
        (x,), case = prepared.inputs, prepared.case
        target, module = target_of(x, case.group), workloads.reference(prepared.eager)
        x = x.double().contiguous()
        if case.direction == WEIGHT_GRADIENT:
            module(x).backward(target.double())
            return {"gradient of weight": module.weight.grad, "gradient of bias": module.bias.grad}
        target = target.double().contiguous() if target.is_floating_point() else target
        step = TrainingStep(WithLoss(module), x, target, train=False)
        return {"output": step()} | step.gradients()


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
            found.append(dataclasses.replace(case, direction=WEIGHT_GRADIENT, mode=mode))
        elif case.group in ("block", "model"):
            found.append(dataclasses.replace(case, what=f"{case.what} step", mode=mode))
            if case.group == "model" and case.dtype == "bf16":
                found.append(dataclasses.replace(found[-1], what=f"{case.what} step {AUTOCAST}"))
    return tuple(found)


def show(run: Run) -> None:
    """Print the times of every candidate, and ours compared with eager and with the fastest peer."""
    for group in dict.fromkeys(record.group for record in run.records):
        options.show(report.candidates(run, (group,), f"{group}: ms, median (minimum)", minima=True), width=240)
    machine = run.machine
    click.echo(
        f"{machine['cpu']['name']}, {machine['threads']['cores']} cores, {run.conditions['threads']} threads, "
        f"PyTorch {machine['libraries']['torch']}, commit {machine['commit']}, {run.created}; {OPTIMISER}"
    )


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", "mode", flag_value=QUICK, help="One stage, no models, eager and torch.compile's defaults.")
@click.option("--full", "mode", flag_value=FULL, help="More rounds.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only cases with this in their name.")
@click.option("--dtype", "dtypes", type=click.Choice(["fp32", "bf16"]), multiple=True, default=("fp32", "bf16"))
@options.threads
@click.option("--list", "as_list", is_flag=True, help="List the names of the cases and exit.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all times and their conditions here.")
def main(
    mode: str | None,
    only: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    as_list: bool,
    file: Path | None,
) -> None:
    """Measure and print; fails if this package is wrong or fails in a case."""
    mode = mode or STANDARD
    try:
        selected = table.select(mode, only, everything=[case for case in cases() if case.dtype in dtypes])
    except ValueError as error:
        raise click.ClickException(f"--only {error}") from error
    if as_list:
        click.echo("\n".join(case.name for case in selected))
        return
    with options.thread_count(threads):
        run = start("cpu", mode)
        run.conditions["optimiser"] = OPTIMISER
        session = TrainingSession("cpu", mode, {}, candidates=CANDIDATES, garbage=GARBAGE)
        bench.measure(run, selected, file, session)
    show(run)
    bench.finish(run, None, False)


if __name__ == "__main__":
    main()
