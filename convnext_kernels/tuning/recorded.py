"""The calls of this package's ops that a model makes, and the choices that they leave open: for `tune`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convnext_kernels import backends, dispatch
from convnext_kernels.ops import registration
from convnext_kernels.torch_versions import TorchDispatchMode, tree_leaves
from convnext_kernels.tuning import cache
from convnext_kernels.tuning.cost import Candidate
from convnext_kernels.tuning.gpus import Gpu
from convnext_kernels.tuning.pick import forced, predicted_seconds
from convnext_kernels.tuning.report import Timing

if TYPE_CHECKING:
    from convnext_kernels.bench.timing import Times

MOST = 8  # configurations of one kernel that are timed: those with the lowest predicted times
EAGER = "eager"


@dataclass
class Call:
    """A kind of call that the model makes, with the tensors of the first one that was made."""

    name: str  # of the registered op: "block_backward"
    arguments: list[Any]
    op: str
    shape: tuple[int, ...]
    dtype: str
    variant: str
    flops: int
    count: int = 0
    outer: "Point | None" = None  # the choice of a backend, if there is one

    @property
    def backends(self) -> list[str]:
        """The backends that may compute it."""
        return [self.requested] if self.outer is None else [candidate.name for candidate in self.outer.candidates]

    @property
    def phase(self) -> str:
        """Forward or backward."""
        return "backward" if self.name.endswith("_backward") else "forward"

    @property
    def x(self) -> Tensor:
        """The op's input (N, C, H, W)."""
        return self.arguments[self.phase == "backward"]

    @property
    def requested(self) -> str:
        """The backend that the call requests, or "auto"."""
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
class Point:
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
        self.calls: dict[Any, Call] = {}

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
            parts = ("V2" if kind.grn and kind.op != "grn" else "", kind.convolution)
            variant = " ".join(part for part in parts if part)
            arguments = _detached(list(args))
            self.calls[facts] = Call(name, arguments, kind.op, kind.shape, dtype, variant, flops)
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


def record(model: nn.Module, example: Tensor, training: bool) -> list[Call]:
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


def points(call: Call, choices: Mapping[str, str], planned: list[Any] | None = None) -> list[Point]:
    """The choices with several candidates that a call makes, given some of them. Triton's launchers launch nothing.

    Of a call that fails, those before the error, which will be reported when it is timed.
    """
    found: dict[str, Point] = {}

    def choice(kernel: str, problem: tuple, candidates: Sequence[Candidate], where: Gpu | str) -> Candidate | None:
        key = cache.key(kernel, problem, where)
        if len(candidates) > 1:
            found.setdefault(key, Point(key, kernel, tuple(candidates), where))
        return next((candidate for candidate in candidates if candidate.name == choices.get(key)), None)

    with suppress(Exception), torch.no_grad(), forced(choice, [] if planned is None else planned):
        registration.plainly(call.name, *call.arguments)
    return list(found.values())


def merged(found: list[Call]) -> list[Call]:
    """One call for each class of calls that share a choice, with the number of all of them."""
    kinds: dict[Any, Call] = {}
    for call in found:
        call.outer = next((point for point in points(call, {}) if point.backends), None)
        first = kinds.setdefault(id(call) if call.outer is None else call.outer.key, call)
        if first is not call:
            first.count += call.count
    return list(kinds.values())
