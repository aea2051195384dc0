"""`tune`: time everything that the calls of a model leave open, and keep the fastest."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convnext_kernels import calls, dispatch
from convnext_kernels.ops import registration
from convnext_kernels.tuning import cache
from convnext_kernels.tuning.recorded import EAGER, Call, Point, merged, points, record
from convnext_kernels.tuning.report import Row, Timing, TuneReport, describe

if TYPE_CHECKING:
    from convnext_kernels.bench.timing import Times

ROUNDS = {"cpu": 7, "cuda": 20}
ROUND_SECONDS = 5.0  # of all rounds, about; slow candidates have fewer rounds, but at least three
TRITON = "triton"


def _compile(found: list[Call], end: float) -> None:
    """Compile what the Triton backend may launch for these calls, in parallel."""
    planned: list[Any] = []
    for call in found:
        if TRITON not in call.backends:
            continue
        _plan(call, {} if call.outer is None else {call.outer.key: TRITON}, planned, set())
    if planned:
        from convnext_kernels.backends.triton import ahead, device

        if not device.interpreted():
            now = time.monotonic()
            ahead.compile_all(ahead.units(planned), now + (end - now) / 2)  # the other half is for timing


def _plan(call: Call, choices: dict[str, str], planned: list[Any], seen: set[str]) -> None:
    """Add the programs of every candidate of a call to `planned`, also of choices that only a candidate has."""
    for point in points(call, choices, planned):
        if point.backends or point.key in seen:
            continue
        seen.add(point.key)
        for name in point.likely():
            _plan(call, choices | {point.key: name}, planned, seen)


def _graph(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    """A CUDA graph of one call, so that host time does not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile, prepare, and launch as the graph will
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def _times(functions: Mapping[str, Callable[[], object]], device: str) -> "dict[str, Times]":
    """Time functions in turn; the names say what they are."""
    from convnext_kernels.bench import timing

    begin = time.perf_counter()
    for function in functions.values():
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    rounds = int(ROUND_SECONDS / (time.perf_counter() - begin))
    rounds = max(3, min(rounds, ROUNDS["cuda" if device == "cuda" else "cpu"]))
    return timing.interleave(functions, rounds=rounds, bursts=True, device=device)


class _Tuner:
    def __init__(self, report: TuneReport, end: float, on_result: Callable[[Timing], object] | None) -> None:
        self.report, self.end, self.on_result = report, end, on_result
        self.settled: dict[str, str] = {}  # what was found in this run: key, name

    def over(self) -> bool:
        return time.monotonic() >= self.end

    def say(self, timing: Timing) -> None:
        self.report.timings.append(timing)
        if self.on_result is not None:
            self.on_result(timing)

    def measure(self, call: Call, candidates: Mapping[str, tuple[str, str, dict[str, str]]]) -> "dict[str, Times]":
        """Time candidates: by name, each with its backend, its plan in words, and its choices."""
        device, functions = call.x.device.type, {}
        pool = torch.cuda.graph_pool_handle() if device == "cuda" else None  # the graphs share their memory

        def fail(name: str, error: Exception) -> None:
            self.say(call.timing(*candidates[name][:2], error=error))

        try:
            for name, (backend, _, choices) in candidates.items():
                try:
                    functions[name] = self.function(call, backend, choices, pool)
                except Exception as error:  # compilers and drivers raise many types; the other candidates may run
                    fail(name, error)
            try:
                times = _times(functions, device) if functions else {}
            except Exception as error:
                for name in functions:
                    fail(name, error)
                return {}
        finally:
            cache.end_trials()
        for name, taken in times.items():
            self.say(call.timing(*candidates[name][:2], taken))
        return times

    def function(self, call: Call, backend: str, choices: dict[str, str], pool: Any) -> Callable[[], object]:
        """A function that runs a call with these choices; it has run before."""
        trial, arguments = cache.Trial(choices), list(call.arguments)
        if call.requested != dispatch.AUTO:
            arguments[-1] = backend

        def run() -> None:
            trial.begin()
            registration.call(call.name, *arguments)

        with torch.inference_mode():
            run()
            return run if pool is None else _graph(run, pool)

    def tune(self, call: Call) -> None:
        """Time everything that a call leaves open."""
        outer = call.outer
        found: dict[str, tuple[str, str, dict[str, str]]] = {}
        for backend in call.backends:
            choices = {} if outer is None else {outer.key: backend}
            plan = []
            while (point := self.open(call, choices)) is not None:
                if point.key not in self.settled:
                    if self.over():
                        self.cut(call)
                        return
                    trials = {n: (backend, f"{point.kernel}: {n}", choices | {point.key: n}) for n in point.likely()}
                    if times := self.measure(call, trials):
                        self.keep({point.key: min(times, key=lambda n: times[n].minimum)})
                choices[point.key] = self.settled.get(point.key, "")  # "": none of them runs
                if choices[point.key]:
                    plan.append(f"{point.kernel}: {choices[point.key]}")
            choices = {key: name for key, name in choices.items() if name}
            found[backend] = (backend, ", ".join(plan), choices)
        if outer is None:
            if len(found[call.requested][2]) == 0:  # nothing to choose
                return
            found.setdefault(EAGER, (EAGER, "", {}))  # to compare with
        if self.over():
            self.cut(call)
            return
        times = self.measure(call, found)
        seconds = {name: taken.minimum / 1e3 for name, taken in times.items()}
        best = min(seconds, key=seconds.__getitem__, default=None)
        if outer is None:
            best = call.requested
        elif best is not None:
            self.keep({outer.key: best})
        if best is not None:
            kind = (call.op, call.shape, call.phase, call.dtype, call.variant, call.count)
            self.report.rows.append(Row(*kind, seconds.get(EAGER), seconds.get(best), best, found[best][1]))

    def open(self, call: Call, choices: dict[str, str]) -> Point | None:
        """The first choice that is not among `choices`; some exist only after others, as the tiles of a plan."""
        return next((p for p in points(call, choices) if not p.backends and p.key not in choices), None)

    def keep(self, choices: dict[str, str]) -> None:
        """Keep choices at once, so that an interruption loses nothing."""
        self.settled |= choices
        self.report.choices |= choices
        cache.keep(choices)

    def cut(self, call: Call) -> None:
        self.report.not_timed.append(describe(call.timing("", "")))


def _check(model: Any, example: Any, training: Any, minutes: Any, write: Any, on_result: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
    devices = {p.device for p in model.parameters()}
    if devices and example.device not in devices:
        there = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"example: is on {example.device}, expected the device of the model's parameters: {there}")
    if training not in (None, True, False):
        raise TypeError(f"training: expected True, False or None, got {training!r}")
    if minutes is not None:
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)):
            raise TypeError(f"minutes: expected a number, got {type(minutes).__name__}")
        if not minutes > 0:
            raise ValueError(f"minutes: expected a number above 0, got {minutes}")
    if on_result is not None and not callable(on_result):
        raise TypeError(f"on_result: expected a function, got {type(on_result).__name__}")
    if write is not None:
        path = Path(write)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError("is a folder, expected a file")
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise OSError(f"write: {path} cannot be written: {error.strerror or error}") from error


def tune(
    model: nn.Module,
    example: Tensor,
    *,
    training: bool | None = None,
    minutes: float | None = None,
    write: str | os.PathLike | None = None,
    on_result: Callable[[Timing], object] | None = None,
) -> TuneReport:
    """Time every way to compute the calls that `model` makes of this package's ops, and keep the fastest.

    The model runs once on `example`, with a backward pass if `training` is true (None: if ``model.training``). Then
    every kind of call is timed with every backend that can serve it, the eager one included, and with every
    configuration of its kernels; on a GPU by CUDA graphs. The choices are kept in the user's cache folder. Later calls
    of the same kind take them, in this process and in later ones, on the same machine with the same versions; a class
    of calls is one shape, with the batch rounded up to a power of two. A backend that is requested by name stays; only
    its configurations are chosen.

    Run it with the dtype, memory format, autocast and, for training, ``example.requires_grad`` of the real calls. The
    model's parameters, gradients, buffers and modes and the random state stay as they are.

    Timing stops after `minutes`; what was found until then is kept, and the report says what was not timed. `write` is
    a file that the choices are added to; `convnext_kernels.tuning.load` reads it on another machine of the same kind.
    `on_result` gets every `Timing` at once. A candidate that does not run is a `Timing` with an error.

    Raises TypeError or ValueError for wrong arguments and for a model that makes no call of this package's ops, OSError
    if the file cannot be written.
    """
    _check(model, example, training, minutes, write, on_result)
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    found = record(model, example, model.training if training is None else training)
    if not found:
        raise ValueError(
            "model: it makes no call of this package's ops, expected a model after accelerate() (see "
            "acceleration_report) or one with this package's modules"
        )
    device = example.device
    with (
        torch.cuda.device(device) if example.is_cuda else nullcontext(),
        torch.autocast(device.type, enabled=False),  # the recorded arguments have been cast
    ):
        return _tune(found, device.type, end, write, on_result)


def _tune(
    found: list[Call],
    device: str,
    end: float,
    write: str | os.PathLike | None,
    on_result: Callable[[Timing], object] | None,
) -> TuneReport:
    where = dispatch.machine(device)
    report = TuneReport(where if isinstance(where, str) else where.machine)
    tuner = _Tuner(report, end, on_result)
    try:
        found = merged(found)
        _compile(found, (time.monotonic() + end) / 2)  # the other half is for timing
        for call in found:
            tuner.tune(call)
    finally:
        if write is not None and report.choices:
            cache.write(Path(write), report.choices)
        calls.forget()  # what was prepared for candidates
    return report
