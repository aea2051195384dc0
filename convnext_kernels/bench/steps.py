"""The steps of `verify`, the most telling first: their items, and how one is run (`workers` has the processes)."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

import convnext_kernels as ck
from convnext_kernels.bench import ceilings, checks, host
from convnext_kernels.bench.candidates import DTYPES, GRAPH, MODEL_CANDIDATES, NEEDS_GPU, quiet
from convnext_kernels.bench.cases import NETWORKS, STANDARD, Case, network
from convnext_kernels.bench.measure import ROUNDS, Session, memory_missing, one_line, prepare, record_of, results
from convnext_kernels.bench.results import OK, OURS, UNAVAILABLE, WRONG, Check
from convnext_kernels.bench.timing import interleave
from convnext_kernels.bench.workloads import initialise
from convnext_kernels.models import create_model
from convnext_kernels.tuning import cache

Emit = Callable[..., None]  # emit(kind, **values): a result

# Name: share of the time. What a step leaves over goes to the next ones.
STEPS = {
    "precompile": 0.15,
    "numerics bf16": 0.12,
    "host time": 0.03,
    "CUDA graphs": 0.02,
    "models": 0.28,
    "candidates": 0.29,
    "tuned models": 0.03,
    "numerics fp32": 0.04,
    "numerics fp16": 0.04,
}
# The share of a step's time that one item may have. The first model that is tuned compiles what the others need too.
ITEM_SHARE = {"candidates": 0.8}
# (model, batch, direction), the most telling first.
_ORDER = {
    "cuda": ((1, "forward"), (32, "training"), (32, "forward"), (128, "forward"), (128, "training"), (8, "forward")),
    "cpu": ((1, "forward"), (2, "training")),
}
MODELS = {
    device: tuple((label, n, direction) for n, direction in order for label in NETWORKS)
    for device, order in _ORDER.items()
}
DTYPE = {"cuda": "bf16", "cpu": "fp32"}  # of whole models
BATCHES = {"cuda": (32, 1, 128, 8), "cpu": (1, 8)}  # of the candidates
SIDE = 224  # of their images
PRECOMPILED = 6  # models of the list: the later ones need more memory than several processes can have
FIRST_CHECKS = 40  # numerical checks that are compiled before the models
TUNED = 3  # models that are timed again after tuning
LEAST_SECONDS = 20.0  # that an item gets, if the step has them, before it counts as hanging
MOST_SECONDS = 600.0  # for one item without --minutes


class Item(NamedTuple):
    """A part of a step."""

    step: str
    name: str  # op, shape and dtype, for messages
    what: Any  # what `run` needs; it can be pickled


def _checks(device: str, dtype: str) -> list[Item]:
    found = checks.cases(device, dtype)
    return [Item(f"numerics {dtype}", f"{case.group} {case.what} {dtype}", case) for case in found]


def _models(step: str, device: str, names: list[str], most: int | None = None) -> list[Item]:
    cases = [network(label, n, DTYPE[device], direction) for label, n, direction in MODELS[device][:most]]
    names = [name for name in names if device == "cuda" or not name.endswith(NEEDS_GPU)]
    return [Item(step, f"{case.name} {name}", (case, name)) for case in cases for name in names]


def _precompile(device: str) -> list[Item]:
    """What is compiled before: the kernels of the first checks in bf16, the models, the kernels of other checks."""
    kernels: dict[str, list[Item]] = {"bf16": [], "fp32": [], "fp16": []}
    if ck.list_backends()["triton"].available and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        kernels = {dtype: _checks(device, dtype) for dtype in kernels}
    names = [c.name for c in MODEL_CANDIDATES if c.name == OURS or "torch.compile" in c.name]
    models = _models("precompile", device, names, PRECOMPILED) if device == "cuda" else []
    others = [item for dtype in ("fp32", "fp16") for item in kernels[dtype][:FIRST_CHECKS]]
    found = [*kernels["bf16"][:FIRST_CHECKS], *models, *others, *kernels["bf16"][FIRST_CHECKS:]]
    return [item._replace(step="precompile") for item in found]


def items(step: str, device: str) -> list[Item]:
    """The items of a step, the most telling first."""
    kind, _, dtype = step.partition(" ")
    if kind == "numerics":
        return _checks(device, dtype)
    if step == "precompile":
        return _precompile(device)
    if step == "models":
        return _models(step, device, [candidate.name for candidate in MODEL_CANDIDATES])
    if step == "tuned models":
        return _models(step, device, [OURS, f"{OURS}, {GRAPH}"], TUNED)
    if step == "CUDA graphs":
        return [Item(step, "ConvNeXt-T", None)] if device == "cuda" else []
    if step == "host time":  # on a CPU a network's call is its computation
        kinds = host.KINDS[: 3 if device == "cuda" else 2]
        whats = [(kind, direction) for direction in ("forward", "training") for kind in kinds]
        return [Item(step, " ".join(what), what) for what in whats]
    whats = [(label, n) for n in BATCHES[device] for label in NETWORKS]
    shape = f"3x{SIDE}x{SIDE} {DTYPE[device]}"
    return [Item(step, f"{label} {n}x{shape}", (NETWORKS[label], n, SIDE)) for label, n in whats]


def nothing_to_do(step: str, device: str) -> str:
    """Why a step has no items."""
    if step == "precompile":
        return "nothing to compile: no Triton backend, or Triton's interpreter"
    return f"needs a GPU, the device is {device}"


class Running:
    """What the items of one process share."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stack = ExitStack()
        self.case: tuple[str, Case] | None = None  # with its step: after tuning a model is built again
        self.opened: Any = None
        self.failed: Exception | None = None  # why the case could not be built
        self.unit = 0.0

    def open(self, step: str, case: Case, rates: dict) -> Any:
        """The modules and the reference of a case, kept for its next candidate."""
        if self.case != (step, case):
            self.stack.close()
            self.case, self.opened, self.failed = (step, case), None, None
            session = Session(self.device, STANDARD, rates, candidates=MODEL_CANDIDATES)
            try:
                self.opened = self.stack.enter_context(session.opened(case))
            except Exception as error:
                self.failed = error
        if self.failed is not None:
            raise self.failed
        return self.opened


def _record(running: Running, item: Item, emit: Emit, rates: dict) -> None:
    """Check one candidate of a model, then time it alone: nothing that is timed waits for the next candidate."""
    case, name = item.what
    if running.case != (item.step, case) and (why := memory_missing(case, running.device)):
        emit("record", **asdict(record_of(case)(name, UNAVAILABLE, why)))
        return
    opened = running.open(item.step, case, rates)
    record = opened.check(name)
    if name in opened.calls:
        training = case.direction == "training"
        with quiet(), opened.session.timing():
            calls = {name: opened.calls[name]}
            times = interleave(calls, rounds=ROUNDS[STANDARD], bursts=True, training=training, device=running.device)
        record = opened.add_times(name, times[name])
        del opened.calls[name]  # with its module, graphs and compiled code
    if item.step == "tuned models":
        record = replace(record, candidate=f"{name}, tuned")
    emit("record", **asdict(record))


def _candidates(device: str, item: Item, emit: Emit, seconds: float | None) -> None:
    name, n, side = item.what  # a whole model: its four stages' kernels are compiled in parallel
    form = {"device": device, "dtype": DTYPES[DTYPE[device]]}
    model = create_model(name, layer_scale_init_value=1.0).to(**form)
    x = torch.randn(n, 3, side, side, **form).to(memory_format=torch.channels_last)
    file = cache.folder() / cache.FILE
    known = cache.read(file)

    def choices() -> None:
        """What was chosen since the last call."""
        nonlocal known
        entries = cache.read(file)
        if new := dict(entries.items() - known.items()):
            emit("choices", choices=new)
        known = entries

    def on_result(timing: Any) -> None:
        choices()
        emit("timing", **timing._asdict())

    ck.tune(model, x, training=True, minutes=None if seconds is None else seconds / 60, on_result=on_result)
    choices()


def _graphs(device: str, emit: Emit) -> None:
    """``ck.graphed`` against the same model without a graph, before and after its weights change."""
    model = create_model("convnext_tiny").eval().requires_grad_(False)
    initialise(model)
    model = model.to(device, torch.bfloat16)
    x = torch.randn(2, 3, 224, 224, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    graph = ck.graphed(model, x)
    for what in ("as captured", "other input", "other weights"):
        if what == "other input":
            x = x.flip(0)
        elif what == "other weights":
            initialise(model, seed=1)
        expected, found = model(x), graph(x)
        error, size = (t.abs().max().item() for t in (expected - found, expected))
        # The same launches give the same bits; only the libraries' own choices may be others under capture.
        right = error <= 0.05 * size
        reason = f"differs from the model without a graph by {error:.3g}, the largest logit is {size:.3g}"
        verdict = (OK, "") if right else (WRONG, reason)
        check = Check("graphed", f"ConvNeXt-T, {what}", "bf16", "CUDA graph", *verdict, error / size, 0.05)
        emit("check", **asdict(check))


def _compile(item: Item, device: str) -> None:
    if isinstance(item.what, Case):
        checks.compile_kernels(item.what, device)
        return
    case, name = item.what
    (candidate,) = (c for c in MODEL_CANDIDATES if c.name == name)
    call = candidate.build(prepare(case, device))  # torch.compile runs once here
    if name == OURS:
        results(call)


def run(running: Running, item: Item, emit: Emit, seconds: float | None, rates: dict) -> None:
    """Run an item and emit its results; an error is a result too. `seconds`: the time that is left."""
    try:
        _run(running, item, emit, seconds, rates)
    except Exception as error:
        emit("failure", item=item.name, reason=one_line(error))


def _run(running: Running, item: Item, emit: Emit, seconds: float | None, rates: dict) -> None:
    device = running.device
    if item.step.startswith("numerics"):
        for check in checks.check(item.what, device, checks.backends(device)[0]):
            emit("check", **asdict(check))
    elif item.step == "precompile":
        _compile(item, device)
    elif item.step == "environment":
        emit("ceilings", ceilings=ceilings.measure(device))
    elif item.step == "host time":
        kind, direction = item.what
        running.unit = running.unit or host.unit()
        for name, taken in host.measure(kind, direction == "training", device, DTYPES[DTYPE[device]]).items():
            values = {"us": taken * 1e6, "units": taken / running.unit, "unit_us": running.unit * 1e6}
            emit("host", what=kind, direction=direction, candidate=name, **values)
    elif item.step == "CUDA graphs":
        _graphs(device, emit)
    elif item.step == "candidates":
        _candidates(device, item, emit, seconds)
    else:
        _record(running, item, emit, rates)
