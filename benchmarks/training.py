"""Training on a CPU compared with eager PyTorch and torch.compile: times and targets.

    python benchmarks/training.py [--quick | --full] [--only PATTERN] [--dtype bf16] [--json FILE] [--check]

Three kinds of cases, at batch 8 except for volumes:

- the gradient of the weight and bias of the 7x7 depthwise convolution, called as an operator; of volumes, at batch 1
  (`--only 'dwconv3d/*'`), of all three kernels
- a training step of the block
- a training step of torchvision's ConvNeXt-T

A step is what a training loop does: drop the gradients, forward, loss (mean squared error; cross entropy for the
model), backward, optimiser. The optimiser is AdamW(fused=True) for all, PyTorch's fastest AdamW on CPUs. It is part of
the step because it changes the weights, so this package must pack them again in every step. Stochastic depth is off, so
that all candidates compute the same.

Measured like `convnext-kernels bench`: every candidate is first compared with fp64 (the loss and all gradients of the
first step). Only correct ones are timed, in turn, pinned, on an allocator that keeps its memory. A ratio is the time of
the fastest peer over ours. Peers get both memory formats; torch.compile gets model and loss in one graph.

"bf16": parameters and images in bf16. "autocast": fp32 parameters under torch.autocast(bfloat16). Candidates "by hand"
are weight gradients written as sums, which torch.compile fuses. PyTorch's convolutions do not use them, so they are
shown, but are not peers in the ratios.
"""

import copy
import dataclasses
import fnmatch
import functools
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convnext_kernels.bench import cases as table
from convnext_kernels.bench import numerics, results, workloads
from convnext_kernels.bench.candidates import DTYPES, Call, Candidate, Prepared, Step, quiet
from convnext_kernels.bench.cases import FULL, MODES, QUICK, STANDARD, Case
from convnext_kernels.bench.charts import number
from convnext_kernels.bench.measure import Session
from convnext_kernels.bench.results import EAGER, OK, OURS, Ratio, Record, Run, is_ours, ratio, save

WEIGHT_GRADIENT, AUTOCAST, BY_HAND = "weight-gradient", "autocast", "by hand"
CONTIGUOUS, COMPILED = "eager, contiguous", "torch.compile"
COMPILED_CONTIGUOUS, AUTOTUNED = "torch.compile, contiguous", "torch.compile, max-autotune"
# Targets: times faster than the best of eager and torch.compile, by group and dtype.
TARGETS = {
    ("dwconv", "bf16"): 20.0,
    ("dwconv", "fp32"): 5.0,
    ("dwconv3d", "bf16"): 5.0,
    ("dwconv3d", "fp32"): 5.0,
    ("block", "bf16"): 2.5,
    ("block", "fp32"): 1.3,
    ("model", "bf16"): 2.0,
}
OPTIMISER = "AdamW(fused=True, lr=1e-3)"
# Results with a larger relative error are not timed. PyTorch's own bf16 gradients of LayerNorm's parameters are up to
# 89 % off in the first stage at batch 8 (sums over 25088 pixels). They are used in practice, so they are timed, and
# named below the tables.
GARBAGE = 2.0


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimiser for all candidates."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


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
        self.target, self.autocast, self.train = target, autocast, train
        self.first = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.restart()

    def restart(self) -> None:
        """Restore the initial weights, with a new optimiser."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(self.first[name])
        self.optimiser = optimiser(self.module) if self.train else None

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


def target_of(x: Tensor, group: str) -> Tensor:
    """Return the target of the loss: another image for a block, classes for a model; the same numbers for all."""
    generator = torch.Generator().manual_seed(2)
    if group == "model":
        return torch.randint(1000, (len(x),), generator=generator)
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))


def is_autocast(case: Case) -> bool:
    return case.what.endswith(AUTOCAST)


def _step(prepared: Prepared, module: nn.Module, memory_format: torch.memory_format) -> TrainingStep:
    (x,), case = prepared.inputs, prepared.case
    x = x.contiguous(memory_format=memory_format)
    return TrainingStep(module, x, target_of(x, case.group), is_autocast(case))


def _eager_step(memory_format: torch.memory_format) -> Callable[[Prepared], Call]:
    def build(prepared: Prepared) -> Call:
        # A copy, because steps change the weights, and the next candidate must start from the same ones.
        model = copy.deepcopy(prepared.eager).to(memory_format=memory_format)
        return _step(prepared, WithLoss(model), memory_format)

    return build


def _compiled_step(memory_format: torch.memory_format, mode: str | None = None) -> Callable[[Prepared], Call]:
    def build(prepared: Prepared) -> Call:
        model = copy.deepcopy(prepared.eager).to(memory_format=memory_format)
        module = torch.compile(WithLoss(model), fullgraph=True, dynamic=False, mode=mode)
        step = _step(prepared, module, memory_format)
        with quiet():
            step()
        step.restart()
        return step

    return build


def _our_step(memory: str | None) -> Callable[[Prepared], Call]:
    def build(prepared: Prepared) -> Call:
        model = copy.deepcopy(prepared.ours)
        if memory is not None:
            model.memory = memory
        return _step(prepared, WithLoss(model), torch.channels_last)

    return build


def convolution_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, by the operator that PyTorch's autograd calls."""
    c, k, axes = x.shape[1], weight.shape[-1], x.dim() - 2
    ones, zeros = [1] * axes, [0] * axes
    arguments = (dy, x, weight, [c], ones, [k // 2] * axes, ones, False, zeros, c, [False, True, True])
    return torch.ops.aten.convolution_backward(*arguments)[1:]


def sums_of_shifts(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same gradients, as one sum over the shifted image per tap."""
    k, (h, w) = weight.shape[-1], x.shape[-2:]
    padded, d = F.pad(x, (k // 2,) * 4).float(), dy.float()
    taps = [(d * padded[:, :, i : i + h, j : j + w]).sum((0, 2, 3)) for i in range(k) for j in range(k)]
    return torch.stack(taps, 1).view_as(weight).to(weight.dtype), d.sum((0, 2, 3)).to(weight.dtype)


def sums_of_windows(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same gradients, as one sum over a view of all shifted images."""
    k, (h, w) = weight.shape[-1], x.shape[-2:]
    windows, d = F.pad(x, (k // 2,) * 4).unfold(2, h, 1).unfold(3, w, 1), dy.float()
    taps = (windows.float() * d[:, :, None, None]).sum((0, 4, 5))
    return taps.view_as(weight).to(weight.dtype), d.sum((0, 2, 3)).to(weight.dtype)


def _our_gradient(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    ops, needs = torch.ops.convnext_kernels, [False, True, True]
    if x.dim() == 5:
        return ops.dwconv3d_backward(dy, x, weight, bias, 1, needs, "auto")
    return ops.dwconv_backward(dy, x, weight, bias, 1, 1, 1, needs, "auto")


def _gradient(
    function: Callable[..., tuple], memory_format: torch.memory_format = torch.channels_last, compiled: bool = False
) -> Callable[[Prepared], Call]:
    """Build a call in which `function` computes the gradients of weight and bias."""

    def build(prepared: Prepared) -> Call:
        (x,), used = prepared.inputs, memory_format
        if x.dim() == 5 and used is NHWC:
            used = torch.channels_last_3d
        x = x.contiguous(memory_format=used)
        weight, bias = prepared.eager.weight.detach(), prepared.eager.bias.detach()
        arguments = (target_of(x, "dwconv"), x, weight.contiguous(memory_format=used))
        arguments += (bias,) if function is _our_gradient else ()
        call = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        with quiet(), torch.inference_mode():
            call(*arguments)
        return lambda: dict(zip(("gradient of weight", "gradient of bias"), call(*arguments), strict=True))

    return build


def _available(_: Prepared) -> str:
    return ""


def _wanted(*groups: str, quick: bool = True) -> Callable[[Case, str], bool]:
    def wanted(case: Case, mode: str) -> bool:
        return case.group in groups and (quick or mode != QUICK)

    return wanted


def _by_group(gradient: Callable[[Prepared], Call], step: Callable[[Prepared], Call]) -> Callable[[Prepared], Call]:
    return lambda prepared: (gradient if prepared.case.direction == WEIGHT_GRADIENT else step)(prepared)


NHWC, NCHW = torch.channels_last, torch.contiguous_format
COMPILED_TOO = _wanted("dwconv", "block", "model")
EVERYWHERE = _wanted("dwconv", "dwconv3d", "block", "model")
CANDIDATES = (
    Candidate(EAGER, _available, _by_group(_gradient(convolution_gradient), _eager_step(NHWC)), EVERYWHERE),
    Candidate(OURS, _available, _by_group(_gradient(_our_gradient), _our_step(None)), EVERYWHERE),
    Candidate(f"{OURS}, min", _available, _our_step("min"), _wanted("block")),
    Candidate(f"{OURS}, balanced", _available, _our_step("balanced"), _wanted("block")),
    Candidate(CONTIGUOUS, _available, _by_group(_gradient(convolution_gradient, NCHW), _eager_step(NCHW)), EVERYWHERE),
    Candidate(
        COMPILED,
        _available,
        _by_group(_gradient(convolution_gradient, compiled=True), _compiled_step(NHWC)),
        COMPILED_TOO,
    ),
    Candidate(
        COMPILED_CONTIGUOUS,
        _available,
        _by_group(_gradient(convolution_gradient, NCHW, compiled=True), _compiled_step(NCHW)),
        _wanted("dwconv", "block", quick=False),
    ),
    Candidate(AUTOTUNED, _available, _compiled_step(NHWC, "max-autotune-no-cudagraphs"), _wanted("block", quick=False)),
    Candidate(
        f"{BY_HAND}, shifts", _available, _gradient(sums_of_shifts, compiled=True), _wanted("dwconv", quick=False)
    ),
    Candidate(
        f"{BY_HAND}, windows", _available, _gradient(sums_of_windows, compiled=True), _wanted("dwconv", quick=False)
    ),
)


class TrainingSession(Session):
    """Measures the cases below."""

    def prepare(self, case: Case) -> tuple[Prepared, workloads.Workload]:
        prepared, workload = super().prepare(dataclasses.replace(case, dtype="fp32") if is_autocast(case) else case)
        return dataclasses.replace(prepared, case=case), workload

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

    def measure(self, case: Case, on_step: Callable[[str], None] = lambda _: None) -> list[Record]:
        # Here the loss would be counted too; training_memory.py counts what blocks keep for the backward pass.
        return [dataclasses.replace(record, saved_bytes=None) for record in super().measure(case, on_step)]


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases, from the table of `convnext-kernels bench`, with their own names."""
    found = []
    for case in table.cases():
        if case.direction != "training" or case.batch != (1 if case.group == "dwconv3d" else 8):
            continue
        mode = QUICK if case.channels == 384 else STANDARD
        if case.group == "dwconv" and case.kernel_size == 7:
            found.append(dataclasses.replace(case, direction=WEIGHT_GRADIENT, mode=mode))
        elif case.group == "dwconv3d":  # PyTorch's takes up to two seconds
            found.append(dataclasses.replace(case, direction=WEIGHT_GRADIENT, mode=FULL))
        elif case.group == "block":
            found.append(dataclasses.replace(case, what=f"{case.what} step", mode=mode))
        elif case.group == "model":
            found.append(dataclasses.replace(case, what=f"{case.what} step", mode=STANDARD))
            if case.dtype == "bf16":
                found.append(dataclasses.replace(found[-1], what=f"{case.what} step {AUTOCAST}"))
    return tuple(found)


def select(mode: str, only: tuple[str, ...] = (), dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[Case]:
    """The cases of `mode`, or of any mode where patterns are given; ValueError for a pattern without a case."""
    found = []
    for case in cases():
        matches = any(p.lower() in case.name.lower() or fnmatch.fnmatch(case.name, p) for p in only)
        if case.dtype in dtypes and (matches if only else MODES.index(case.mode) <= MODES.index(mode)):
            found.append(case)
    if not found:
        raise ValueError(f"no case of {' and '.join(dtypes)} has {' or '.join(map(repr, only))} in its name")
    return found


@dataclasses.dataclass(frozen=True)
class Figure:
    """One setting of this package in one case, compared with the fastest peer; None where there is no time."""

    ours: Record
    peer: Record | None
    ratio: Ratio | None  # by medians, and in single rounds
    by_minimum: float | None
    by_hand: float | None  # compared with the fastest "by hand", by medians
    target_ratio: float | None

    @property
    def missed(self) -> bool:
        return self.target_ratio is not None and (self.ratio is None or not self.ratio.value >= self.target_ratio)


def target_ratio(record: Record) -> float | None:
    """The target of a record: only this package with its defaults has one."""
    if record.candidate != OURS or record.what.endswith(AUTOCAST):
        return None
    return TARGETS.get((record.group, record.dtype))


def _fastest(records: list[Record]) -> Record | None:
    return min((r for r in records if r.times is not None), key=lambda r: r.times.median, default=None)


def figures(run: Run) -> list[Figure]:
    """Return measured ratios and targets."""
    found = []
    for case in run.cases().values():
        others = [record for record in case.values() if not is_ours(record.candidate)]
        peer = _fastest([record for record in others if not record.candidate.startswith(BY_HAND)])
        by_hand = _fastest([record for record in others if record.candidate.startswith(BY_HAND)])
        for ours in (record for record in case.values() if is_ours(record.candidate)):
            times, value = ours.times, None
            if times is not None and peer is not None:
                value = ratio({OURS: ours, peer.candidate: peer}, peer.candidate)
            found.append(
                Figure(
                    ours,
                    peer,
                    value,
                    None if value is None else peer.times.minimum / times.minimum,
                    None if times is None or by_hand is None else by_hand.times.median / times.median,
                    target_ratio(ours),
                )
            )
    return found


def _milliseconds(record: Record | None) -> str:
    if record is None:
        return ""
    return record.status if record.times is None else f"{number(record.times.median)} ({number(record.times.minimum)})"


def make_table(title: str, *columns: str) -> Table:
    found = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        found.add_column(column, justify="right" if i else "left", no_wrap=True)
    return found


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def show(run: Run, console: Console) -> list[Figure]:
    """Print times, then the ratios and their targets; return those that missed it."""
    for group in dict.fromkeys(record.group for record in run.records):
        records = [record for record in run.records if record.group == group]
        names = list(dict.fromkeys(record.candidate for record in records))
        shown = make_table(f"{group}: ms, median (minimum)", "case", *(n.replace(OURS, "ours") for n in names))
        for case in run.cases().values():
            first = next(iter(case.values()))
            if first.group == group:
                shown.add_row(f"{first.what} {first.dtype}", *(_milliseconds(case.get(name)) for name in names))
        console.print(shown, highlight=False)
        console.print()
    found = figures(run)
    shown = make_table(
        f"times faster than the best of eager and torch.compile, {run.conditions['threads']} threads",
        *("case", "memory", "peer", "by medians", "in rounds", "by minima", "target", "", "than by hand"),
    )
    for f in found:
        value = f.ratio
        shown.add_row(
            f"{f.ours.what} {f.ours.dtype}",
            f.ours.candidate.partition(", ")[2] or ("" if f.ours.direction == WEIGHT_GRADIENT else "auto"),
            "" if f.peer is None else f.peer.candidate,
            f.ours.status if value is None else _times(value.value),
            "" if value is None else f"{value.low:.2f}-{value.high:.2f}",
            "" if f.by_minimum is None else _times(f.by_minimum),
            "" if f.target_ratio is None else f"{f.target_ratio:g}x",
            "" if f.target_ratio is None else "MISSED" if f.missed else "met",
            "" if f.by_hand is None else _times(f.by_hand),
        )
    console.print(shown, highlight=False)
    missed = [f for f in found if f.missed]
    console.print(f"{sum(f.target_ratio is not None for f in found)} targets, {len(missed)} missed", highlight=False)
    for record in run.records:
        if record.status != OK:
            console.print(f"{record.case}, {record.candidate}: {record.status}: {record.reason}", highlight=False)
        elif record.error > numerics.GARBAGE[DTYPES[record.dtype]]:
            line = f"{record.case}, {record.candidate}: timed, but a gradient is off by {record.error:.0%}"
            console.print(line, highlight=False)
    return missed


def console() -> Console:
    """The console; a file or a pipe has no width of its own, and gets a large one."""
    found = Console()
    if not found.is_terminal:
        found.width = 240
    return found


def conditions(run: Run) -> list[str]:
    """Return where this was measured, and the warnings."""
    machine, found = run.machine, run.conditions
    lines = [
        f"{machine['cpu']['name']}, {machine['threads']['cores']} cores, {found['threads']} threads, "
        f"PyTorch {machine['libraries']['torch']}, commit {machine['commit']}, {run.created}",
        f"pinning: {found.get('pinning', found['pinned'])}; allocator: {found['allocator']}; optimiser: {OPTIMISER}",
    ]
    return lines + [f"warning: {line}" for line in found["warnings"]]


def measure(run: Run, selected: list[Case], file: Path | None, session: Session) -> None:
    """Measure, add the records to `run`, and save it after every case."""
    at_start, begun = list(run.conditions["warnings"]), time.perf_counter()
    for case in selected:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        run.records += session.measure(case)
        run.seconds = time.perf_counter() - begun
        run.conditions["course"] = session.course.summary()
        run.conditions["warnings"] = at_start + session.course.warnings()
        run.complete = case is selected[-1]
        if file is not None:
            save(run, file)


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", "mode", flag_value=QUICK, help="One stage, no models, eager and torch.compile's defaults.")
@click.option("--full", "mode", flag_value=FULL, help="More rounds.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Cases with this in their name, of any mode.")
@click.option("--dtype", "dtypes", type=click.Choice(["fp32", "bf16"]), multiple=True, default=("fp32", "bf16"))
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: PyTorch's]")
@click.option("--list", "as_list", is_flag=True, help="List the names of the cases and exit.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all times and their conditions here.")
@click.option("--check", is_flag=True, help="Fail if a target is missed.")
def main(
    mode: str | None,
    only: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    as_list: bool,
    file: Path | None,
    check: bool,
) -> None:
    """Measure, print and check."""
    from convnext_kernels.cli import bench, options

    mode = mode or STANDARD
    try:
        selected = select(mode, only, dtypes)
    except ValueError as error:
        raise click.ClickException(f"--only, --dtype: {error}") from error
    if as_list:
        click.echo("\n".join(case.name for case in selected))
        return
    with options.thread_count(threads):
        run = bench.start("cpu", mode)
        run.conditions["optimiser"] = OPTIMISER
        measure(run, selected, file, TrainingSession("cpu", mode, run.ceilings, candidates=CANDIDATES, garbage=GARBAGE))
    for line in conditions(run):
        click.echo(line)
    missed = show(run, console())
    wrong = [r for r in run.records if is_ours(r.candidate) and r.status in (results.WRONG, results.FAILED)]
    sys.exit(1 if wrong or (check and missed) else 0)


if __name__ == "__main__":
    main()
