"""Prepare once, run many: a launcher runs once per signature on "meta" tensors, and what it does is replayed.

A launcher (`forward`, `backward` of an op) chooses a plan, makes views, computes grids, allocates and launches; that
costs more host time than a GPU needs for a small batch. All of it depends on the signature alone: shapes, strides,
dtypes, 16-byte alignment and options. So it runs once, on tensors without memory, and `Recorder` writes down what
reaches the device: allocations, launches, and PyTorch's operators (casts, copies, matmuls). Views are no step: the
pointer of a view is the pointer of its buffer and a constant. `Program.run` replays the steps with other tensors: the
first time one by one, then by a function that is generated from them, without loops and lookups.

Nothing that a tensor contains is remembered: weights are packed and cast at every call, because a write through
``.data`` changes neither pointer nor version. What is kept between calls (`backends/triton/weights.py`) is compared by
the device.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnext_kernels.calls import Signature
from convnext_kernels.torch_versions import TorchDispatchMode, below_autograd, tf32_allowed
from convnext_kernels.tuning import cache, forcing
from convnext_kernels.tuning.pick import planned

_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_ALIGNMENT = 512  # of PyTorch's allocator
_local = threading.local()


class View(NamedTuple):
    """A tensor of a program: a view of one of its buffers."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements from the first element of the buffer
    itemsize: int
    whole: bool  # the buffer itself
    transposed: bool  # the transpose of the buffer, a matrix
    dtype: torch.dtype | None = None  # if it is not the buffer's

    def of(self, buffers: list) -> Tensor:
        """The tensor, for these buffers."""
        buffer = buffers[self.slot]
        if self.whole:
            return buffer
        if self.dtype is not None:
            buffer = buffer.view(self.dtype)
        return buffer.as_strided(self.size, self.stride, buffer.storage_offset() + self.offset)

    def source(self, code: "Code") -> str:
        """The same as an expression."""
        name = f"t{self.slot}"
        if self.whole:
            return name
        if self.transposed:
            return f"{name}.t()"  # in half the time
        if self.dtype is not None:
            name = f"{name}.view({code.constant(self.dtype)})"
        start = f"{name}.storage_offset() + " if self.slot < code.inputs else ""
        return f"{name}.as_strided({self.size}, {self.stride}, {start}{self.offset})"


class Code:
    """Lines of the function that replays a program. Buffer i is the variable ti, its address ai."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"empty": torch.empty, "empty_like": torch.empty_like}
        self.constants["empty_strided"] = torch.empty_strided

    def constant(self, value: Any) -> str:
        """An expression for `value`."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def function(self) -> Callable:
        """The function of (tensors, addresses, stream); `keep`: see `Recorder.given_by`."""
        source = "\n    ".join(("def replay(tensors, addresses, stream, keep=None):", *self.lines))
        exec(compile(source, "<replay>", "exec"), self.constants)
        return self.constants["replay"]


class _Allocation:
    like: int | None = None  # a dense input with these sizes, strides and dtype

    def __init__(self, view: View, dtype: torch.dtype, device: torch.device) -> None:
        self.view, self.slots = view, (view.slot,)
        self.slot, self.size, self.stride = view.slot, view.size, view.stride
        self.options = {"dtype": dtype, "device": device}
        # as dense tensors have: the last element that strides reach
        reach = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        self.bytes = reach * dtype.itemsize if all(self.size) else 0

    def run(self, buffers: list, addresses: list[int], _stream: int | None) -> None:
        if self.like is None:
            buffer = torch.empty_strided(self.size, self.stride, **self.options)
        else:  # in half the time
            buffer = torch.empty_like(buffers[self.like])
        buffers[self.slot] = buffer
        addresses[self.slot] = buffer.data_ptr()

    def write(self, code: Code) -> None:
        name = f"t{self.slot}"
        if self.like is None:
            options = f"dtype={code.constant(self.options['dtype'])}, device={code.constant(self.options['device'])}"
            dense = self.stride == torch.empty(self.size, device="meta").stride()
            made = f"empty({self.size}, " if dense else f"empty_strided({self.size}, {self.stride}, "
            code.lines.append(f"{name} = {made}{options})")
        else:
            code.lines.append(f"{name} = empty_like(t{self.like})")
        code.lines.append(f"a{self.slot} = {name}.data_ptr()")


class _Workspace:
    """One allocation for several temporaries; those that are not in use at the same time may share memory."""

    def __init__(self, parts: list[tuple[int, int, int, int]], device: torch.device) -> None:
        self.slots = tuple(slot for slot, *_ in parts)
        self.places = []
        placed: list[tuple[int, int, int, int]] = []  # (begin, end) in bytes, (first, last) step
        for slot, size, first, last in parts:
            begin = 0
            for low, high, earlier, later in sorted(placed):
                if earlier <= last and first <= later and begin + size > low:
                    begin = max(begin, high)
            end = begin + -(-size // _ALIGNMENT) * _ALIGNMENT
            placed.append((begin, end, first, last))
            self.places.append((slot, begin))
        self.size = (max(end for _, end, _, _ in placed),)
        self.options = {"dtype": torch.uint8, "device": device}

    def write(self, code: Code) -> None:
        device = code.constant(self.options["device"])
        code.lines.append(f"workspace = empty({self.size}, dtype={code.constant(torch.uint8)}, device={device})")
        code.lines.append("start = workspace.data_ptr()")
        code.lines += [f"a{slot} = start + {begin}" for slot, begin in self.places]


# PyTorch's own functions take the same arguments as the operators behind them and 0.7 us less.
_FUNCTIONS = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.linear.default: torch.nn.functional.linear,
    torch.ops.aten.copy_.default: torch.Tensor.copy_,
    torch.ops.aten.clone.default: torch.clone,
    torch.ops.aten.sum.dim_IntList: torch.sum,
}


class _Operator:
    """One of PyTorch's operators."""

    extra: tuple[str, ...] = ()  # arguments in the generated function

    def __init__(self, function: Callable, arguments: list, keywords: dict, result: View | None) -> None:
        self.function, self.arguments, self.keywords, self.result = function, arguments, keywords, result
        used = [a for a in (*arguments, *keywords.values(), result) if isinstance(a, View)]
        self.slots = tuple(view.slot for view in used)

    def run(self, buffers: list, addresses: list[int], _stream: int | None) -> None:
        arguments = [a.of(buffers) if type(a) is View else a for a in self.arguments]
        keywords = {k: a.of(buffers) if type(a) is View else a for k, a in self.keywords.items()}
        result = self.function(*arguments, **keywords)
        if self.result is not None:
            if result.stride() != self.result.stride:
                raise RuntimeError(f"{self.function}: strides {result.stride()}, on meta {self.result.stride}")
            buffers[self.result.slot] = result
            addresses[self.result.slot] = result.data_ptr()

    def write(self, code: Code) -> None:
        def expression(value: Any) -> str:
            return value.source(code) if type(value) is View else code.constant(value)

        arguments = [expression(a) for a in self.arguments]
        arguments += [*self.extra, *(f"{name}={expression(a)}" for name, a in self.keywords.items())]
        call = f"{code.constant(_FUNCTIONS.get(self.function, self.function))}({', '.join(arguments)})"
        if self.result is None:
            code.lines.append(call)
        else:
            slot = self.result.slot
            code.lines += [f"t{slot} = {call}", f"a{slot} = t{slot}.data_ptr()"]


class _Release:
    """Lets go of buffers after their last use, as the launcher does when it drops a tensor."""

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots

    def run(self, buffers: list, _addresses: list[int], _stream: int | None) -> None:
        for slot in self.slots:
            buffers[slot] = None

    def write(self, code: Code) -> None:
        code.lines.append(f"del {', '.join(f't{slot}' for slot in self.slots)}")


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype


class Recorder(TorchDispatchMode):
    """Writes down what a launcher does with tensors on "meta"."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.steps: list[Any] = []
        self.inputs = 0  # the first buffers
        self.buffers: list[Tensor] = []  # on "meta", kept, so that storages are told apart by their addresses
        self._slots: dict[int, int] = {}  # storage of a tensor on "meta": slot
        self.begins: dict[int, int] = {}  # slot of an input: its address modulo 16

    def buffer(self, tensor: Tensor) -> int:
        """Give a tensor with a storage of its own a slot."""
        self._slots[tensor.untyped_storage()._cdata] = len(self.buffers)
        self.buffers.append(tensor)
        return len(self.buffers) - 1

    def known(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of a buffer."""
        return tensor.untyped_storage()._cdata in self._slots

    def view(self, tensor: Tensor) -> View:
        """Where a tensor lies."""
        slot = self._slots[tensor.untyped_storage()._cdata]
        buffer = self.buffers[slot]
        size, stride, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        if tensor.dtype != buffer.dtype:
            return View(slot, size, stride, offset, tensor.element_size(), False, False, tensor.dtype)
        whole = (size, stride, offset) == (tuple(buffer.shape), buffer.stride(), 0)
        transposed = buffer.dim() == 2 and (size, stride, offset) == (tuple(buffer.T.shape), buffer.T.stride(), 0)
        return View(slot, size, stride, offset, tensor.element_size(), whole, transposed and not whole)

    def begin(self, tensor: Tensor) -> int:
        """The address that a tensor has when the program runs, modulo 16."""
        begin = self.begins.get(self._slots[tensor.untyped_storage()._cdata], 0)
        return (begin + tensor.storage_offset() * tensor.element_size()) & 15

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (list, tuple)) else [result]
        fresh = [t for t in outputs if isinstance(t, Tensor) and not self.known(t)]
        if not fresh and not func._schema.is_mutable:
            return result  # a view
        if len(fresh) > 1:
            raise NotImplementedError(f"{func} has several results")
        view = self._fresh(fresh[0]) if fresh else None
        if view is not None and func._schema.name.partition("::")[2] in _EMPTY:
            allocation = _Allocation(view, fresh[0].dtype, self.device)
            allocation.like = self._twin(fresh[0])
            self.steps.append(allocation)
            return result
        keywords = {k: self._argument(v) for k, v in kwargs.items()}
        if isinstance(keywords.get("device"), torch.device):
            keywords["device"] = self.device
        self.steps.append(_Operator(func, [self._argument(a) for a in args], keywords, view))
        return result

    def _twin(self, tensor: Tensor) -> int | None:
        for slot, other in enumerate(self.buffers[: self.inputs]):
            if _layout(other) == _layout(tensor) == _layout(torch.empty_like(other)):
                return slot
        return None

    def given_by(self, tensor: Tensor, function: Callable, *arguments: Any) -> None:
        """Let `tensor`, which was allocated just now, come from ``function(*arguments)`` when the program runs.

        If it may keep the tensor for later calls, it gets the stream of the call as the argument `stream`. Calls from
        graphs of `torch.compile` may not keep memory: it can belong to a CUDA graph, which uses it for other tensors.
        """
        self.steps[-1] = _Operator(function, [self._argument(a) for a in arguments], {}, self.view(tensor))
        self.steps[-1].extra = ("stream=keep",)

    def _fresh(self, tensor: Tensor) -> View:
        self.buffer(tensor)
        return self.view(tensor)

    def _argument(self, value: Any) -> Any:
        return self.view(value) if isinstance(value, Tensor) else value

    def result(self, value: Any) -> Any:
        """What the launcher returned, with a `View` for each tensor."""
        if isinstance(value, (list, tuple)):
            return [self.result(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        view = self.view(value)
        return view if view.whole else self._allocated_as(value, view)

    def _allocated_as(self, tensor: Tensor, view: View) -> View:
        """A result that is a view of a whole buffer in another shape: where only launches use the buffer, it is
        allocated in that shape, which saves the view (1.5 us).
        """
        buffer, slot = self.buffers[view.slot], view.slot
        steps = [i for i, step in enumerate(self.steps) if slot in step.slots]
        if not steps or type(self.steps[steps[0]]) is not _Allocation or tensor.numel() != buffer.numel():
            return view
        if tensor.dtype != buffer.dtype:
            return view
        if any(type(self.steps[i]) is _Operator for i in steps) or not (
            tensor.is_contiguous() and buffer.is_contiguous()
        ):
            return view
        view = view._replace(whole=True, transposed=False)
        allocation = self.steps[steps[0]] = _Allocation(view, tensor.dtype, self.device)
        allocation.like = self._twin(tensor)
        return view


def recorder() -> Recorder | None:
    """The recorder that this thread's launcher runs under."""
    return getattr(_local, "recorder", None)


def aligned(tensor: Tensor, size: int) -> bool:
    """Whether the data of a launcher's tensor begin at a multiple of `size` bytes, 16 at most."""
    found = recorder()
    return (tensor.data_ptr() if found is None else found.begin(tensor)) % size == 0


class Program:
    """The steps of one launcher for one signature.

    `run` takes the steps one by one until every launch knows its launcher. From then on it calls a function that is
    generated from them. In it temporaries that only launches use need no tensors: they are parts of one allocation,
    which they share over time.
    """

    def __init__(self, steps: list[Any], result: Any, inputs: int, slots: int) -> None:
        self.result, self.inputs, self.extra = result, inputs, slots - inputs
        self.single = type(result) is View
        kept = {view.slot for view in ([result] if self.single else result) if view is not None}
        used = kept.union(*(step.slots for step in steps if type(step) is not _Allocation))
        self.steps = [step for step in steps if type(step) is not _Allocation or step.slot in used]
        last = {slot: i for i, step in enumerate(self.steps) for slot in step.slots if slot >= inputs}
        self.last = {slot: i for slot, i in last.items() if slot not in kept}
        self.all = self._ordered(set())
        self.launches = [step for step in self.steps if hasattr(step, "launcher")]
        self.replay: Callable | None = None

    def _ordered(self, shared: set[int]) -> list[Any]:
        """The steps without the allocations of `shared`, with what is released in between."""
        ordered: list[Any] = []
        for i, step in enumerate(self.steps):
            if type(step) is _Allocation and step.slot in shared:
                continue
            ordered.append(step)
            done = tuple(slot for slot, at in self.last.items() if at == i and slot not in shared)
            if done and i + 1 < len(self.steps):
                ordered.append(_Release(done))
        return ordered

    def _generated(self) -> Callable:
        """The steps as a function, with one allocation for all temporaries that only launches use."""
        others = {slot for step in self.steps if type(step) is _Operator for slot in step.slots}
        shared = [(i, s) for i, s in enumerate(self.steps) if type(s) is _Allocation and s.slot in self.last]
        shared = [(i, s) for i, s in shared if s.slot not in others]
        steps = self.all
        if len(shared) > 1:
            parts = [(step.slot, step.bytes, begin, self.last[step.slot]) for begin, step in shared]
            steps = [_Workspace(parts, shared[0][1].options["device"]), *self._ordered({s.slot for _, s in shared})]
        code = Code(self.inputs)
        for letter, values in ("t", "tensors"), ("a", "addresses"):
            code.lines.append(f"{', '.join(f'{letter}{i}' for i in range(self.inputs))}, = {values}")
        for step in steps:
            step.write(code)
        views = [view.source(code) if view else "None" for view in ([self.result] if self.single else self.result)]
        code.lines.append(f"return {views[0] if self.single else '[' + ', '.join(views) + ']'}")
        return code.function()

    def run(self, tensors: Sequence[Tensor], addresses: Sequence[int], stream: int | None) -> Any:
        """Do what the launcher would do with `tensors`, whose data lie at `addresses`."""
        if self.replay is not None and stream is not None:
            return self.replay(tensors, addresses, stream)
        buffers, places = [*tensors, *[None] * self.extra], [*addresses, *[0] * self.extra]
        for step in self.all:
            step.run(buffers, places, stream)
        if stream is not None and all(step.launcher for step in self.launches):
            self.replay = self._generated()
        if self.single:
            return self.result.of(buffers)
        return [None if view is None else view.of(buffers) for view in self.result]


def _on_meta(value: Any, recorder: Recorder) -> Any:
    if isinstance(value, Tensor):
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        recorder.begins[recorder.buffer(meta)] = value.data_ptr() & 15
        return meta
    if isinstance(value, tuple):
        copies = [_on_meta(v, recorder) for v in value]
        return type(value)(*copies) if hasattr(value, "_fields") else tuple(copies)
    return value


def record(launcher: Callable, arguments: Sequence[Any], device: torch.device) -> Program:
    """Run ``launcher(*arguments)`` on "meta". Arguments are tensors, tuples, and values."""
    found = Recorder(device)

    copies = [_on_meta(a, found) for a in arguments]
    inputs = found.inputs = len(found.buffers)
    before, _local.recorder = recorder(), found
    try:
        with found:
            result = launcher(*copies)
    finally:
        _local.recorder = before
    return Program(found.steps, found.result(result), inputs, len(found.buffers))


def record_call(launcher: Callable, arguments: Sequence[Any]) -> Program:
    """`record` for the arguments that an op passes to a launcher: its call, or a gradient and its call, and more."""
    plain = [a._replace(inputs=None) if hasattr(a, "inputs") else a for a in arguments]
    return record(launcher, plain, next(a.x for a in arguments if hasattr(a, "inputs")).device)


def inputs_of(arguments: Sequence[Any]) -> tuple[Any, Signature, list[Tensor], list[int]] | None:
    """The call among a launcher's arguments, its signature, and the tensors and addresses that its program takes.

    None if the call comes from another launcher: then the launcher simply runs, as a part of the other.
    """
    call = arguments[0]
    forward = not isinstance(call, Tensor)
    if not forward:
        call = arguments[1]
    if call.inputs is None:
        return None
    signature, tensors, addresses, *_ = call.inputs
    if forward and len(arguments) > 1:  # tensors that the op has allocated for the launcher
        tensors = [*tensors, *arguments[1:]]
        addresses = [*addresses, *(tensor.data_ptr() for tensor in arguments[1:])]
    return call, signature, tensors, addresses


def preparing(environment: Callable[[Tensor], tuple[tuple, Any]]) -> Callable[[Callable], Callable]:
    """A decorator for launchers, which runs a launcher once per signature and then replays what it did.

    ``environment(tensor)``, with a tensor on the call's device: what a program depends on beside the signature, and
    what `Program.run` takes as the stream. A launcher takes an op's call, or a gradient and the call; then what else
    the op passes. A call that comes from another launcher has no signature: `launcher` simply runs, as a part of the
    other.

    In the signature's `memo` the decorated launcher is the key of a function of (tensors, addresses) that replays the
    call where the environment is the same, else returns `NotImplemented`: `ops/registration.py` calls it before all
    that leads to a launcher.
    """

    def decorate(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def run(*arguments: Any, **keywords: Any) -> Any:
            inputs = inputs_of(arguments)
            if inputs is None:
                return launcher(*arguments, **keywords)
            call, signature, tensors, addresses = inputs
            fp32 = call.x.dtype is torch.float32
            facts, stream = environment(tensors[0])
            if forcing():
                program = record_call(launcher, arguments)
                if (programs := planned()) is not None:
                    programs.append(program)
                    return None
                return program.run(tensors, addresses, stream)
            facts = (*facts, fp32 and tf32_allowed(), cache.generation())  # TF32 says nothing for 16 bits
            key = (launcher, facts, len(arguments))
            program = signature.memo.get(key)
            if program is None:
                program = signature.memo[key] = record_call(launcher, arguments)
            result = program.run(tensors, addresses, stream)
            if program.replay is not None:
                kept = tensors[len(call.inputs.tensors) :]
                signature.memo[run] = _direct(environment, program.replay, facts, fp32, call.x, kept)
            return result

        return run

    return decorate


def _direct(
    environment: Callable, replay: Callable, known: tuple, fp32: bool, x: Tensor, kept: Sequence[Tensor]
) -> Callable:
    """What stands in the `memo` for a launcher; `kept`, which the op has allocated, it allocates and returns, too."""
    *same, tf32, generation = known
    same = tuple(same)
    likes = [_layout(tensor) == _layout(x) == _layout(torch.empty_like(x)) for tensor in kept]
    allocations = [
        functools.partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in kept
    ]
    allocations = [None if like else allocate for like, allocate in zip(likes, allocations, strict=True)]

    def run(tensors: list[Tensor], addresses: list[int]) -> Any:
        facts, stream = environment(tensors[0])
        if stream is None or facts != same or cache.generation() != generation or forcing():
            return NotImplemented
        if fp32 and tf32_allowed() is not tf32:
            return NotImplemented
        with below_autograd():
            if not allocations:
                return replay(tensors, addresses, stream, stream)
            x = tensors[0]
            kept = [torch.empty_like(x) if allocate is None else allocate() for allocate in allocations]
            addresses = addresses + [tensor.data_ptr() for tensor in kept]
            return [replay(tensors + kept, addresses, stream, stream), *kept]

    return run
