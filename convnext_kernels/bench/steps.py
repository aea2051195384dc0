"""The steps of `verify`, the most telling first: their items, and how one is run (`workers` has the processes)."""

import os
from collections.abc import Callable, Iterator
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
MOST_SECONDS = 600.0  # for one item without --minutes
HOST_SECONDS = 0.3  # for each figure of host time
BURST = 10  # calls of a block without waiting for the GPU: their launches must fit into its queue (1024)


class Item(NamedTuple):
    """A part of a step."""

    step: str
    name: str  # op, shape and dtype, for messages
    what: Any = None  # what `run` needs; it can be pickled


def _checks(step: str, device: str, dtype: str) -> list[Item]:
    return [Item(step, f"{case.group} {case.what} {dtype}", case) for case in checks.cases(device, dtype)]


def _models(step: str, device: str, names: list[str], most: int | None = None) -> list[Item]:
    shapes = [(label, n, direction) for n, direction in MODELS[device] for label in NETWORKS]
    cases = [network(label, n, DTYPE[device], direction) for label, n, direction in shapes[:most]]
    names = [name for name in names if device == "cuda" or not name.endswith(NEEDS_GPU)]
    return [Item(step, f"{case.name} {name}", (case, name)) for case in cases for name in names]


def _precompile(device: str) -> list[Item]:
    """What is compiled before: the kernels of the first checks, the models, the kernels of the other checks."""
    compiles = ck.list_backends()["triton"].available and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
    found = [i for dtype in ("bf16", "fp32", "fp16") if compiles for i in _checks("precompile", device, dtype)]
    names = [c.name for c in MODEL_CANDIDATES if c.name == OURS or "torch.compile" in c.name]
    models = _models("precompile", device, names, PRECOMPILED) if device == "cuda" else []
    return [*found[:FIRST_CHECKS], *models, *found[FIRST_CHECKS:]]


def items(step: str, device: str) -> list[Item]:
    """The items of a step, the most telling first; none if it needs a GPU or a compiler that is missing."""
    if step.startswith("numerics"):
        return _checks(step, device, step.split()[1])
    if step == "precompile":
        return _precompile(device)
    if step == "models":
        return _models(step, device, [candidate.name for candidate in MODEL_CANDIDATES])
    if step == "tuned models":
        return _models(step, device, [OURS, f"{OURS}, {GRAPH}"], TUNED)
    if step == "CUDA graphs":
        return [Item(step, "ConvNeXt-T")] if device == "cuda" else []
    if step == "host time":
        return [Item(step, f"{case.group} {case.what} {case.direction}", case) for case in _host_cases(device)]
    whats = [(label, n) for n in BATCHES[device] for label in NETWORKS]
    shape = f"3x{SIDE}x{SIDE} {DTYPE[device]}"
    return [Item(step, f"{label} {n}x{shape}", (NETWORKS[label], n, SIDE)) for label, n in whats]


def _host_cases(device: str) -> Iterator[Case]:
    """Blocks at batch 1 and, on a GPU, a network: on a CPU its call is its computation, so a block gets one pixel."""
    side, dtype = 56 if device == "cuda" else 1, DTYPE[device]
    for direction in ("forward", "training"):
        for label, grn in (("V1", False), ("V2", True)):
            build = partial(workloads.op, "block", 1, 96, side, side, grn)
            yield Case("block", label, 1, dtype, direction, "", build)
        if device == "cuda":
            yield network("ConvNeXt-T", 1, dtype, direction)


def _host(device: str, case: Case, emit: Emit) -> None:
    """How long a call keeps Python busy: this package's ("ours") and plain PyTorch's ("eager"), and in units.

    A unit is ten ``torch.add`` of one element. Minima: other processes only add to them.
    """
    a, b = torch.zeros(1), torch.zeros(1)
    unit = fastest(lambda: [torch.add(a, b) for _ in range(10)], HOST_SECONDS, 10)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    prepared = prepare(case, device)
    for name in ("ours", "eager"):
        call = prepared.call(*prepared.parts(name))
        with torch.inference_mode(not case.trains):
            taken = fastest(call, HOST_SECONDS, 1 if case.group == "model" else BURST, wait)
        what = {"what": f"{case.group} {case.what}", "direction": case.direction, "candidate": name}
        emit("host", what | {"us": taken * 1e6, "units": taken / unit})


class Running:
    """What the items of one process share."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.step, self.session = "", Session(device, STANDARD, {})

    def record(self, item: Item, emit: Emit, rates: dict) -> None:
        """Check one candidate of a model, then time it alone: nothing that is timed waits for the next candidate."""
        case, name = item.what
        try:
            if self.step != item.step:  # after tuning a model is built again
                self.session.close()
                self.step, self.session = item.step, Session(self.device, STANDARD, rates, candidates=MODEL_CANDIDATES)
            opened = self.session.open(case)
            record = opened.check(name)
            if name in opened.calls:
                opened.time(name)
                record = opened.records[name]
                del opened.calls[name]  # with its module, graphs and compiled code
        except Exception as error:
            record = record_of(case)(name, *failure(error))
        emit("record", replace(record, candidate=f"{name}, tuned") if item.step == "tuned models" else record)


def _candidates(device: str, item: Item, emit: Emit, seconds: float | None) -> None:
    name, n, side = item.what  # a whole model: its four stages' kernels are compiled in parallel
    form = {"device": device, "dtype": DTYPES[DTYPE[device]]}
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

    ck.tune(model, x, training=True, minutes=None if seconds is None else seconds / 60, on_result=on_result)
    on_result()


def _graphs(device: str, emit: Emit) -> None:
    """``ck.graphed`` against the same model without a graph, before and after its weights change."""
    case = network("ConvNeXt-T", 2, "bf16", "forward")
    model, _ = prepare(case, device).parts("ours")
    model.requires_grad_(False)
    x = torch.randn(2, 3, 224, 224, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
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
    device = running.device
    try:
        if item.step.startswith("numerics"):
            for record in checks.check(item.what, device, checks.backends(device)[0]):
                emit("check", record)
        elif item.step == "precompile":
            _compile(item, device)
        elif item.step == "environment":
            emit("ceilings", {"ceilings": ceilings.measure(device)})
        elif item.step == "host time":
            _host(device, item.what, emit)
        elif item.step == "CUDA graphs":
            _graphs(device, emit)
        elif item.step == "candidates":
            _candidates(device, item, emit, seconds)
        else:
            running.record(item, emit, rates)
    except Exception as error:
        emit("failure", {"item": item.name, "reason": failure(error)[1]})
