"""The steps of `verify`, the most telling first: their items, and how one is run (`workers` has the processes)."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

import convnext_kernels as ck
from convnext_kernels.bench import ceilings, checks, workloads
from convnext_kernels.bench.candidates import DTYPES, GRAPH, MODEL_CANDIDATES, NEEDS_GPU
from convnext_kernels.bench.cases import NETWORKS, STANDARD, Case, network
from convnext_kernels.bench.measure import Session, failure, prepare, record_of, results
from convnext_kernels.bench.results import OK, OURS, WRONG
from convnext_kernels.bench.timing import fastest
from convnext_kernels.models import create_model
from convnext_kernels.tuning import cache

Emit = Callable[..., None]  # emit(kind, value): a result, a record or a dict
Whats = dict[str, Any]  # by the name of an item (op, shape and dtype) what `run` needs; it can be pickled

MODELS = {  # of every network: (batch, direction), the most telling first
    "cuda": ((1, "forward"), (32, "training"), (32, "forward"), (128, "forward"), (128, "training"), (8, "forward")),
    "cpu": ((1, "forward"), (2, "training")),
}
DTYPE = {"cuda": "bf16", "cpu": "fp32"}  # of whole models
BATCHES = {"cuda": (32, 1, 128, 8), "cpu": (1, 8)}  # of the candidates
SIDE = 224  # of their images
PRECOMPILED = 6  # models of the list: the later ones need more memory than several processes can have
FIRST_CHECKS = 40  # numerical checks that are compiled before the models
TUNED = 3  # models that are timed again after tuning
LEAST_SECONDS = 20.0  # that an item gets, if the step has them, before it counts as hanging
MOST_SECONDS = 600.0  # for one item
HOST_SECONDS = 0.3  # for each figure of host time
BURST = 10  # calls of a block without waiting for the GPU: their launches must fit into its queue (1024)


class Running:
    """What the items of one process share."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.step = ""
        self.session = Session(device, STANDARD)  # of the step
        self.seconds = MOST_SECONDS  # that the item has


def _ceilings(running: Running, _what: None, emit: Emit) -> None:
    emit("ceilings", {"ceilings": ceilings.measure(running.device)})


def _checks(dtype: str, device: str) -> Whats:
    return {f"{case.group} {case.what} {dtype}": case for case in checks.cases(device, dtype)}


def _check(running: Running, case: Case, emit: Emit) -> None:
    for record in checks.check(case, running.device, checks.backends(running.device)[0]):
        emit("check", record)


def _models(device: str, names: tuple[str, ...] = (), most: int | None = None) -> Whats:
    """Candidates of whole models, all or those in `names`."""
    shapes = [(label, n, direction) for n, direction in MODELS[device] for label in NETWORKS]
    cases = [network(label, n, DTYPE[device], direction) for label, n, direction in shapes[:most]]
    names = names or tuple(candidate.name for candidate in MODEL_CANDIDATES)
    names = [name for name in names if device == "cuda" or not name.endswith(NEEDS_GPU)]
    return {f"{case.name} {name}": (case, name) for case in cases for name in names}


def _model(running: Running, what: tuple[Case, str], emit: Emit) -> None:
    """Check one candidate of a model, then time it alone: nothing that is timed waits for the next candidate."""
    case, name = what
    try:
        opened = running.session.open(case)
        record = opened.check(name)
        if name in opened.calls:
            opened.time(name)
            record = opened.records[name]
            del opened.calls[name]  # with its module, graphs and compiled code
    except Exception as error:
        record = record_of(case)(name, *failure(error))
    emit("record", replace(record, candidate=f"{name}, tuned") if running.step == "tuned models" else record)


def _compiled(device: str) -> Whats:
    """What is compiled before: the kernels of the first checks, the models, the kernels of the other checks."""
    compiles = ck.list_backends()["triton"].available and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
    found = [item for dtype in ("bf16", "fp32", "fp16") if compiles for item in _checks(dtype, device).items()]
    names = tuple(c.name for c in MODEL_CANDIDATES if c.name == OURS or "torch.compile" in c.name)
    models = _models(device, names, PRECOMPILED) if device == "cuda" else {}
    return dict(found[:FIRST_CHECKS]) | models | dict(found[FIRST_CHECKS:])


def _compile(running: Running, what: Case | tuple[Case, str], _emit: Emit) -> None:
    if isinstance(what, Case):
        checks.compile_kernels(what, running.device)
        return
    case, name = what
    (candidate,) = (c for c in MODEL_CANDIDATES if c.name == name)
    call = candidate.build(prepare(case, running.device))  # torch.compile runs once here
    if name == OURS:
        results(call)


def _hosts(device: str) -> Whats:
    """Blocks at batch 1 and, on a GPU, a network: on a CPU its call is its computation, so a block gets one pixel."""
    side, dtype, cases = 56 if device == "cuda" else 1, DTYPE[device], []
    for direction in ("forward", "training"):
        for label, grn in (("V1", False), ("V2", True)):
            build = partial(workloads.op, "block", 1, 96, side, side, grn)
            cases.append(Case("block", label, 1, dtype, direction, "", build))
        if device == "cuda":
            cases.append(network("ConvNeXt-T", 1, dtype, direction))
    return {f"{case.group} {case.what} {case.direction}": case for case in cases}


def _host(running: Running, case: Case, emit: Emit) -> None:
    """How long a call keeps Python busy: this package's ("ours") and plain PyTorch's ("eager"), and in units.

    A unit is ten ``torch.add`` of one element. Minima: other processes only add to them.
    """
    a, b = torch.zeros(1), torch.zeros(1)
    unit = fastest(lambda: [torch.add(a, b) for _ in range(10)], HOST_SECONDS, 10)
    wait = torch.cuda.synchronize if running.device == "cuda" else lambda: None
    prepared = prepare(case, running.device)
    for name in ("ours", "eager"):
        call = prepared.call(*prepared.parts(name))
        with torch.inference_mode(not case.trains):
            taken = fastest(call, HOST_SECONDS, 1 if case.group == "model" else BURST, wait)
        what = {"what": f"{case.group} {case.what}", "direction": case.direction, "candidate": name}
        emit("host", what | {"us": taken * 1e6, "units": taken / unit})


def _tunings(device: str) -> Whats:
    shape = f"3x{SIDE}x{SIDE} {DTYPE[device]}"
    return {f"{label} {n}x{shape}": (name, n, SIDE) for n in BATCHES[device] for label, name in NETWORKS.items()}


def _tune(running: Running, what: tuple[str, int, int], emit: Emit) -> None:
    name, n, side = what  # a whole model: its four stages' kernels are compiled in parallel
    form = {"device": running.device, "dtype": DTYPES[DTYPE[running.device]]}
    model = create_model(name, layer_scale_init_value=1.0).to(**form)
    x = torch.randn(n, 3, side, side, **form).to(memory_format=torch.channels_last)
    file = cache.folder() / cache.FILE
    known = cache.read(file)

    def on_result(timing: Any = None) -> None:
        """Emit what was chosen since the last call, and a timing."""
        nonlocal known
        entries = cache.read(file)
        if new := dict(entries.items() - known.items()):
            emit("choices", {"choices": new})
        known = entries
        if timing is not None:
            emit("timing", timing._asdict())

    ck.tune(model, x, training=True, minutes=running.seconds / 60, on_result=on_result)
    on_result()


def _graphs(running: Running, _what: None, emit: Emit) -> None:
    """``ck.graphed`` against the same model without a graph, before and after its weights change."""
    case = network("ConvNeXt-T", 2, "bf16", "forward")
    model, _ = prepare(case, running.device).parts("ours")
    model.requires_grad_(False)
    x = torch.randn(2, 3, 224, 224, device=running.device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    graph = ck.graphed(model, x)
    for what in ("as captured", "other input", "other weights"):
        if what == "other input":
            x = x.flip(0)
        elif what == "other weights":
            workloads.initialise(model, seed=1)
        expected, found = model(x), graph(x)
        error, size = (t.abs().max().item() for t in (expected - found, expected))
        status, reason = OK, ""
        if not error <= 0.05 * size:  # the same bits, but for the libraries' own choices under capture
            status = WRONG
            reason = f"differs from the model without a graph by {error:.3g}, the largest logit is {size:.3g}"
        record = record_of(replace(case, what=f"{case.what} {what}"))("CUDA graph", status, reason)
        emit("check", replace(record, error=error / size, allowed_error=0.05))


class Step(NamedTuple):
    """A part of `verify`."""

    share: float  # of the time; what a step leaves over goes to the next ones
    items: Callable[[str], Whats]  # of a device; none if it needs a GPU or a compiler that is missing
    run: Callable[[Running, Any, Emit], None]


STEPS = {
    "ceilings": Step(0.1, lambda device: {device: None}, _ceilings),
    "precompile": Step(0.15, _compiled, _compile),
    "numerics bf16": Step(0.12, partial(_checks, "bf16"), _check),
    "host time": Step(0.03, _hosts, _host),
    "CUDA graphs": Step(0.02, lambda device: {"ConvNeXt-T": None} if device == "cuda" else {}, _graphs),
    "models": Step(0.28, _models, _model),
    "candidates": Step(0.29, _tunings, _tune),
    "tuned models": Step(0.03, partial(_models, names=(OURS, f"{OURS}, {GRAPH}"), most=TUNED), _model),
    "numerics fp32": Step(0.04, partial(_checks, "fp32"), _check),
    "numerics fp16": Step(0.04, partial(_checks, "fp16"), _check),
}
# The share of a step's time that one item may have. The first model that is tuned compiles what the others need too.
ITEM_SHARE = {"ceilings": 1.0, "candidates": 0.8}


class Item(NamedTuple):
    """A part of a step."""

    step: str
    name: str
    what: Any = None


def items(step: str, device: str) -> list[Item]:
    """The items of a step, the most telling first."""
    return [Item(step, name, what) for name, what in STEPS[step].items(device).items()]


def run(running: Running, item: Item, emit: Emit, seconds: float) -> None:
    """Run an item and emit its results; an error is a result too. `seconds`: the time that is left."""
    try:
        running.seconds = seconds
        if running.step != item.step:  # after tuning a model is built again
            running.session.close()
            running.step = item.step
            running.session = Session(running.device, STANDARD, candidates=MODEL_CANDIDATES)
        STEPS[item.step].run(running, item.what, emit)
    except Exception as error:
        emit("failure", {"item": item.name, "reason": failure(error)[1]})
