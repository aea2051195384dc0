"""`tune`: time everything that the calls of a model leave open, and keep the fastest."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from convnext_kernels import backends, calls, dispatch
from convnext_kernels.ops import registration
from convnext_kernels.torch_versions import TorchDispatchMode, tree_leaves
from convnext_kernels.tuning import cache
from convnext_kernels.tuning.cost import Candidate
from convnext_kernels.tuning.gpus import Gpu
from convnext_kernels.tuning.pick import forced, predicted_seconds

if TYPE_CHECKING:
    from convnext_kernels.bench.timing import Times

MOST = 8  # configurations of one kernel that are timed: those with the lowest predicted times
ROUNDS = {"cpu": 7, "cuda": 20}
ROUND_SECONDS = 5.0  # of all rounds, about; slow candidates have fewer rounds, but at least three
EAGER, TRITON = "eager", "triton"


class Timing(NamedTuple):
    """The time of one candidate for one call, or why it does not run."""

    op: str
    shape: tuple[int, ...]  # of x: N, C, H, W
    phase: str  # "forward" or "backward"
    backend: str
    plan: str  # "kernel: configuration" of every choice inside the backend; empty if it has none
    median: float | None  # seconds
    minimum: float | None
    error: str = ""
    dtype: str = ""  # of x
    variant: str = ""  # "V2 k7"


class Row(NamedTuple):
    """The result for one kind of call."""

    op: str
    shape: tuple[int, ...]
    phase: str
    dtype: str
    variant: str
    count: int  # calls of this kind in the model
    eager: float | None  # seconds: the minimum, which other processes disturb least; None if it does not run
    best: float | None
    backend: str  # the fastest, or the one that the model requests
    plan: str


@dataclass
class TuneReport:
    """What `tune` found. ``str()`` of it is a table."""

    machine: str
    rows: list[Row] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)  # as in the file that `write` names
    not_timed: list[str] = field(default_factory=list)  # a line for each call that the minutes did not suffice for

    def __str__(self) -> str:
        head = ("op", "shape", "phase", "calls", "eager ms", "best ms", "times faster than eager", "plan")
        lines = [head]
        for row in self.rows:
            known = row.eager is not None and row.best is not None
            lines.append(
                (
                    f"{row.op} {row.variant}".strip(),
                    "x".join(map(str, row.shape)) + f" {row.dtype}",
                    row.phase,
                    str(row.count),
                    _milliseconds(row.eager),
                    _milliseconds(row.best),
                    f"{row.eager / row.best:.2f}" if known else "-",
                    f"{row.backend} {row.plan}".strip(),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(line.rstrip() for line in (self.machine, *shown, *self.remarks()))

    def remarks(self) -> list[str]:
        """A line for each candidate that does not run and for each call that was not timed."""
        failed = [f"does not run: {_name(t)}: {t.error}" for t in self.timings if t.error]
        return failed + [f"not timed: {line}" for line in self.not_timed]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def _name(t: Timing | Row) -> str:
    shape = "x".join(map(str, t.shape))
    return " ".join(part for part in (t.op, t.variant, shape, t.dtype, t.phase, t.backend, t.plan) if part)


@dataclass
class _Call:
    """A kind of call that the model makes, with the tensors of the first one that was made."""

    name: str  # of the registered op: "block_backward"
    arguments: list[Any]
    op: str
    shape: tuple[int, ...]
    dtype: str
    variant: str
    flops: int
    count: int = 0
    outer: "_Point | None" = None  # the choice of a backend, if there is one

    @property
    def backends(self) -> list[str]:
        """The backends that may compute it."""
        return [self.requested] if self.outer is None else [candidate.name for candidate in self.outer.candidates]

    @property
    def phase(self) -> str:
        return "backward" if self.name.endswith("_backward") else "forward"

    @property
    def x(self) -> Tensor:
        return self.arguments[self.phase == "backward"]

    @property
    def requested(self) -> str:
        return dispatch.requested_backend(self.arguments[-1])  # the last argument of every schema

    def timing(
        self, backend: str, plan: str, times: "Times | None" = None, error: BaseException | None = None
    ) -> Timing:
        """A `Timing` of this call."""
        seconds = (None, None) if times is None else (times.median / 1e3, times.minimum / 1e3)
        said = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        return Timing(
            self.op, self.shape, self.phase, backend, plan, *seconds, f"{said:.300}", self.dtype, self.variant
        )


@dataclass(frozen=True)
class _Point:
    """A choice that a call leaves open."""

    key: str
    kernel: str
    candidates: tuple[Candidate, ...]
    where: Gpu | str

    @property
    def backends(self) -> bool:
        """Whether the candidates are backends."""
        return all(candidate.name in backends.NAMES for candidate in self.candidates)

    def likely(self) -> list[str]:
        """Names of the candidates to time."""
        if isinstance(self.where, str):
            return [candidate.name for candidate in self.candidates]
        ordered = sorted(self.candidates, key=lambda candidate: predicted_seconds(candidate, self.where))
        return [candidate.name for candidate in ordered[:MOST]]


def _facts(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_facts, value)) if isinstance(value, list) else value


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return list(map(_detached, value)) if isinstance(value, list) else value


class _Recorder(TorchDispatchMode):
    """Records the calls of this package's ops. The eager backend computes them: it has nothing to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, _Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        from convnext_kernels.tuning.explain import NAMESPACE, called

        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        with forced(_eager):  # here, not around the model: backward passes run in autograd's threads
            result = func(*args)
        name = func._schema.name.partition("::")[2]
        facts = (name, _facts(list(args)))
        if facts not in self.calls:
            named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=True)}
            kind = called(name.removesuffix("_backward"), named)
            counted = flop_registry.get(func.overloadpacket)
            flops = counted(*args, out_val=result) if counted else 0
            dtype = str(named["x"].dtype).removeprefix("torch.")
            dilated = f"d{kind.dilation}" if kind.dilation > 1 else ""
            parts = ("V2" if kind.grn and kind.op != "grn" else "", f"k{kind.side}" if kind.side else "", dilated)
            variant = " ".join(part for part in parts if part)
            arguments = _detached(list(args))
            self.calls[facts] = _Call(name, arguments, kind.op, kind.shape, dtype, variant, flops)
        self.calls[facts].count += 1
        return result


def _eager(_kernel: str, _problem: tuple, candidates: Sequence[Candidate], _where: Gpu | str) -> Candidate | None:
    return next((candidate for candidate in candidates if candidate.name == EAGER), None)


@contextmanager
def _unchanged(model: nn.Module, training: bool, device: torch.device) -> Iterator[None]:
    """Put the model in training or evaluation; afterwards its modes, buffers and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if "torch._dynamo" in sys.modules:  # a compiled model calls the same ops as the plain one
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _record(model: nn.Module, example: Tensor, training: bool) -> list[_Call]:
    """The kinds of calls that one run of the model makes, those with the most FLOPs first."""
    import convnext_kernels.ops.flops  # noqa: F401  registers the formulas

    recorder = _Recorder()
    with _unchanged(model, training, example.device), torch.set_grad_enabled(training), recorder:
        x = example.detach().requires_grad_(training and example.requires_grad)
        outputs = model(x)
        if training:
            outputs = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
            inputs = [p for p in (x, *model.parameters()) if p.requires_grad]
            if not outputs:
                raise ValueError("training: no output of the model requires a gradient")
            torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs], allow_unused=True)
    return sorted(recorder.calls.values(), key=lambda call: -call.flops * call.count)


def _points(call: _Call, choices: Mapping[str, str], planned: list[Any] | None = None) -> list[_Point]:
    """The choices with several candidates that a call makes, given some of them. Triton's launchers launch nothing.

    Of a call that fails, those before the error, which will be reported when it is timed.
    """
    found: dict[str, _Point] = {}

    def choice(kernel: str, problem: tuple, candidates: Sequence[Candidate], where: Gpu | str) -> Candidate | None:
        key = cache.key(kernel, problem, where)
        if len(candidates) > 1:
            found.setdefault(key, _Point(key, kernel, tuple(candidates), where))
        return next((candidate for candidate in candidates if candidate.name == choices.get(key)), None)

    with suppress(Exception), torch.no_grad(), forced(choice, [] if planned is None else planned):
        registration.plainly(call.name, *call.arguments)
    return list(found.values())


def _merged(found: list[_Call]) -> list[_Call]:
    """One call for each class of calls that share a choice, with the number of all of them."""
    kinds: dict[Any, _Call] = {}
    for call in found:
        call.outer = next((point for point in _points(call, {}) if point.backends), None)
        first = kinds.setdefault(id(call) if call.outer is None else call.outer.key, call)
        if first is not call:
            first.count += call.count
    return list(kinds.values())


def _compile(found: list[_Call], end: float) -> None:
    """Compile what the Triton backend may launch for these calls, in parallel."""
    planned: list[Any] = []
    for call in found:
        if TRITON not in call.backends:
            continue
        choices = {} if call.outer is None else {call.outer.key: TRITON}
        for point in _points(call, choices, planned):
            for name in [] if point.backends else point.likely():
                _points(call, choices | {point.key: name}, planned)
    if planned:
        from convnext_kernels.backends.triton import ahead, device

        if not device.interpreted():
            ahead.compile_all(ahead.units(planned), end)


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

    def measure(self, call: _Call, candidates: Mapping[str, tuple[str, str, dict[str, str]]]) -> "dict[str, Times]":
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

    def function(self, call: _Call, backend: str, choices: dict[str, str], pool: Any) -> Callable[[], object]:
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

    def tune(self, call: _Call) -> None:
        """Time everything that a call leaves open."""
        outer = call.outer
        found: dict[str, tuple[str, str, dict[str, str]]] = {}
        for backend in call.backends:
            choices = {} if outer is None else {outer.key: backend}
            plan = []
            for point in _points(call, choices):
                if point.backends:
                    continue
                if point.key not in self.settled:
                    if self.over():
                        self.cut(call)
                        return
                    trials = {n: (backend, f"{point.kernel}: {n}", choices | {point.key: n}) for n in point.likely()}
                    if times := self.measure(call, trials):
                        self.keep({point.key: min(times, key=lambda n: times[n].minimum)})
                if point.key in self.settled:
                    choices[point.key] = self.settled[point.key]
                    plan.append(f"{point.kernel}: {choices[point.key]}")
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

    def keep(self, choices: dict[str, str]) -> None:
        """Keep choices at once, so that an interruption loses nothing."""
        self.settled |= choices
        self.report.choices |= choices
        cache.keep(choices)

    def cut(self, call: _Call) -> None:
        self.report.not_timed.append(_name(call.timing("", "")))


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
    found = _record(model, example, model.training if training is None else training)
    if not found:
        raise ValueError(
            "model: it makes no call of this package's ops, expected a model after accelerate() (see "
            "acceleration_report) or one with this package's modules"
        )
    with torch.cuda.device(example.device) if example.is_cuda else nullcontext():
        return _tune(found, example.device.type, end, write, on_result)


def _tune(
    found: list[_Call],
    device: str,
    end: float,
    write: str | os.PathLike | None,
    on_result: Callable[[Timing], object] | None,
) -> TuneReport:
    where = dispatch.machine(device)
    report = TuneReport(where if isinstance(where, str) else where.machine)
    tuner = _Tuner(report, end, on_result)
    try:
        found = _merged(found)
        _compile(found, (time.monotonic() + end) / 2)  # the other half is for timing
        for call in found:
            tuner.tune(call)
    finally:
        if write is not None and report.choices:
            cache.write(Path(write), report.choices)
        calls.forget()  # what was prepared for candidates
    return report
