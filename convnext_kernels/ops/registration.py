"""How ops are registered with `torch.library`."""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnext_kernels import calls, dispatch, exporting, torch_versions
from convnext_kernels.spec import BackendError
from convnext_kernels.torch_versions import broadcast_to_and_flatten, tree_flatten, tree_unflatten

_log = logging.getLogger("convnext_kernels")

NAMESPACE = "convnext_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # kept alive: the registrations end with this object

# For `call`, by op: the op as a Function that `torch.func` can transform, and how autocast casts the arguments.
_transformable: dict[str, type[torch.autograd.Function]] = {}
_casts: dict[str, Callable[..., tuple]] = {}
_gradients: dict[str, Callable] = {}  # for `call`: ops with their gradients, of (*tensors, options, inputs)


class _Op(NamedTuple):
    """How an op is called without PyTorch's dispatcher."""

    run: Callable  # its implementation, with `calls.Inputs` before the arguments
    lead: int  # the number of its first arguments that are tensors or None
    types: tuple[tuple[type, ...], ...]  # of the other arguments, as the dispatcher passes them
    lists: tuple[int, ...]  # which of these are lists
    direction: str  # "forward" or "backward"
    wrapped: bool  # whether the result is a list that begins with what the backend's function returns

    def returned(self, result: Any) -> Any:
        """What the op returns if the backend's function, or its replay with what is kept, returns `result`."""
        return [result] if self.wrapped and type(result) is not list else result

    def inputs(self, name: str, arguments: tuple) -> calls.Inputs | None:
        """The call's inputs if the dispatcher would do nothing but convert the arguments and call `run`, else None."""
        if torch_versions.watched() or torch_versions.forward_mode_active():
            return None
        return calls.known(name, self.lead, self.types, self.lists, arguments)


_ops: dict[str, _Op] = {}
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_compositions: dict[str, Callable] = {}  # for `call`: ops as PyTorch's operators, for exporters
# Schema type: types of Python. The dispatcher converts others or refuses them. It calls a ScalarType int, too.
_TYPES = {
    "int": (int, torch.dtype),
    "Optional[int]": (torch.dtype, type(None)),
    "float": (float,),
    "str": (str,),
    "List[bool]": (list,),
    "List[Tensor]": (list,),
}


def call(name: str, *arguments: Any) -> Any:
    """Call op `name`, also under the transforms of `torch.func` and under forward-mode AD.

    These need the gradient as a `torch.autograd.Function` with a rule for vmap. `torch.library` does not make one:
    under the transforms its ops refuse to be differentiated, and their forward-mode derivatives are silently zero.

    Where PyTorch's dispatcher has nothing to do it is not called: it takes 7 us for the 19 arguments of a block.
    """
    if torch.compiler.is_compiling():
        if name in _compositions and exporting.composed():
            return _compose(name, arguments)
        return getattr(torch.ops.convnext_kernels, name)(*arguments)
    direct = _ops[name]
    result = calls.repeat(name, arguments)
    if result is not None:
        return direct.returned(result)
    inputs = direct.inputs(name, arguments)
    if inputs is not None:
        if inputs.requires_grad and torch.is_grad_enabled():
            result = _gradients[name](*arguments[: direct.lead], arguments[direct.lead :], inputs)
            return list(result) if type(result) is tuple else result
        result = replayed(inputs, arguments[-1], direct.direction)
        if result is not NotImplemented:
            return direct.returned(result)
        with torch_versions.below_autograd():
            return direct.run(inputs, *arguments)
    if name in _compositions and exporting.traced():
        with warnings.catch_warnings():
            # The checks and the number of channels are the same in every run of the trace.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return _compose(name, arguments)
    op = getattr(torch.ops.convnext_kernels, name)
    if not torch_versions.transforms_active() and not torch_versions.forward_mode_active():
        device = arguments[0].device.type if isinstance(arguments[0], Tensor) else ""
        if name in _casts and device in _AUTOCAST and torch.is_autocast_enabled(device):
            arguments = _casts[name](torch.get_autocast_dtype(device), *arguments)
            with torch_versions.without_autocast_key(device):
                return call(name, *arguments)
        try:
            if torch.is_grad_enabled():
                return op(*arguments)
            with torch_versions.below_autograd():  # saves the way through autograd's kernel
                return op(*arguments)
        except NotImplementedError as error:
            return _without_op(name, arguments, error)
    function = _transformable[name]
    device = arguments[0].device.type
    if name in _casts and torch.is_autocast_enabled(device):
        arguments = _casts[name](torch.get_autocast_dtype(device), *arguments)
        with torch.autocast(device, enabled=False):
            return function.apply(*arguments)
    return function.apply(*arguments)


def _compose(name: str, arguments: tuple) -> Any:
    """Op `name` computed by PyTorch's operators, under autocast with the arguments that the op would get."""
    x = arguments[0]
    if isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        arguments = _casts[name](torch.get_autocast_dtype(x.device.type), *arguments)
    return _compositions[name](*arguments)


def _without_op(name: str, arguments: tuple, error: NotImplementedError) -> Any:
    """Compute op `name` by PyTorch's operators, because a class of tensors (quantised ones, say) has no such op."""
    kinds = {
        type(a).__name__ for a in arguments if isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter)
    }
    if not kinds or name not in _compositions:
        raise error
    reason = f"{name}: tensors of class {', '.join(sorted(kinds))} do not implement convnext_kernels::{name}"
    if dispatch.requested_backend(arguments[-1]) not in (dispatch.AUTO, "eager"):
        raise BackendError(reason) from error
    _log_once(reason)
    return _compose(name, arguments)


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning("%s; PyTorch's operators compute it", reason)


def on_device(implementation: Callable) -> Callable:
    """``implementation(inputs, *arguments)`` with the GPU of the first argument as the current one.

    PyTorch's own operators do the same: kernels use the current GPU.
    """

    def run(inputs: calls.Inputs, *arguments: Any) -> Any:
        first = arguments[0]
        # for None the implementation raises the error
        if first is None or not first.is_cuda or first.device.index == torch.cuda.current_device():
            return implementation(inputs, *arguments)
        with torch.cuda.device(first.device):
            return implementation(inputs, *arguments)

    return run


def served(inputs: calls.Inputs | None, backend: str, find: Callable[[], tuple]) -> tuple:
    """What ``find()`` returns: the backend's module and whatever else the call's signature decides.

    It checks the arguments, and runs once for each signature and `dispatch.state`. Traced calls have no signature.
    """
    state = dispatch.state(dispatch.requested_backend(backend))
    if state is None or inputs is None:
        return find()
    memo = inputs.signature.memo
    found = memo.get(state)
    if found is None:
        found = memo[state] = find()
    return found


def replayed(inputs: calls.Inputs, backend: str, direction: str) -> Any:
    """What the backend's function `direction` returns, if its launches are prepared, else `NotImplemented`.

    Then a call of a GPU's kernels needs nothing of what leads to them: 4 us of a block's 20.
    """
    memo = inputs.signature.memo
    found = memo.get(backend if backend != dispatch.AUTO else dispatch.state(dispatch.requested_backend()))
    if found is None:
        return NotImplemented
    replay = memo.get(getattr(found[0], direction, None))
    return NotImplemented if replay is None else replay(inputs.tensors, inputs.addresses)


def plainly(name: str, *arguments: Any) -> Any:
    """Run the implementation of op `name`: without gradients, and without PyTorch's dispatcher."""
    return _ops[name].run(calls.inputs(name, arguments), *arguments)


def define(name: str, arguments: str, result: str, implementation: Callable, fake: Callable) -> None:
    """Define ``convnext_kernels::<name>`` with one implementation for all devices and its fake kernel."""
    _LIBRARY.define(f"{name}({arguments}) -> {result}", tags=torch_versions.OP_TAGS)
    run = on_device(implementation)
    _LIBRARY.impl(name, functools.partial(plainly, name), "CompositeExplicitAutograd")
    types = [str(argument.type) for argument in getattr(torch.ops.convnext_kernels, name).default._schema.arguments]
    lead = next((i for i, kind in enumerate(types) if kind not in ("Tensor", "Optional[Tensor]")), len(types))
    options = tuple(_TYPES[kind] for kind in types[lead:])
    lists = tuple(i for i, allowed in enumerate(options) if allowed == (list,))
    direction = "backward" if name.endswith("_backward") else "forward"
    wrapped = result == "Tensor[]" and direction == "forward"
    _ops[name] = _Op(run, lead, options, lists, direction, wrapped)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


@contextmanager
def inline_kernels() -> Iterator[None]:
    """Let AOTInductor put the launches of our Triton kernels into its package, inside a ``with`` block.

    For a program on CUDA that `torch.export` made inside `keep_ops` and with fixed sizes. Its ops become what the
    Triton backend launches and the operators of PyTorch that it calls, so the package needs neither Python nor this
    package. An op that Triton does not serve raises BackendError, one with a dynamic size ValueError. The setting
    belongs to the process.
    """
    with torch_versions.functional_rules(NAMESPACE, {name: functools.partial(_inline, name) for name in _compositions}):
        yield


def _inline(name: str, mode: Any, op: Any, types: tuple, arguments: tuple, keywords: dict | None = None) -> Any:
    *arguments, _ = arguments
    for argument in arguments:
        if isinstance(argument, Tensor) and any(type(size) is not int for size in argument.shape):
            raise ValueError(
                f"inline_kernels: convnext_kernels::{name} got a tensor of size {tuple(argument.shape)}, expected "
                "fixed sizes, for which launches are planned: export without dynamic_shapes"
            )
    with mode, exporting.tracing_launches():
        return _ops[name].run(None, *arguments, "triton")


def composed(name: str, composition: Callable) -> None:
    """Let exporters see op `name` as the operators of PyTorch that ``composition(*arguments)`` calls.

    It checks the arguments as the op does.
    """
    _compositions[name] = composition


def differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    """Attach the gradient of op `name`, and a clear error for the gradient of that gradient."""

    def no_double_backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"convnext_kernels::{name} cannot be differentiated twice; for second derivatives use the model "
            "before accelerate(), or restore(model)"
        )

    for op, setup, gradient in (
        (name, setup_context, backward),
        (f"{name}_backward", _keep_nothing, no_double_backward),
    ):
        _transformable[op] = _function(op, setup, gradient)
        _attach(op, setup, gradient)


def _attach(name: str, setup_context: Callable, backward: Callable) -> None:
    """Make `backward` the gradient of op `name`.

    Not `torch.library.register_autograd`: for ops that return lists it flattens all arguments and results in Python,
    which takes as long as all launches of a block.
    """
    op = getattr(torch.ops.convnext_kernels, name).default
    run, lead, returns_list = _ops[name].run, _ops[name].lead, _returns_list(name)

    # `ctx` as the first argument, not `setup_context` as in `_function`: for that one PyTorch inspects the signature of
    # `forward` at every call, which takes longer than the rest of it. The options as one argument: PyTorch does
    # something for each.
    def forward(ctx: Any, *given: Any) -> Any:
        *tensors, options, inputs = given
        arguments = (*tensors, *options)
        result = NotImplemented if inputs is None else replayed(inputs, options[-1], "forward")
        if result is not NotImplemented:
            result = _ops[name].returned(result)
        else:
            with torch_versions.below_autograd():
                result = op(*arguments) if inputs is None else run(inputs, *arguments)
        setup_context(ctx, arguments, result)
        return tuple(result) if returns_list else result

    def gradient(ctx: Any, *gradients: Tensor | None) -> Any:
        found = backward(ctx, list(gradients)) if returns_list else backward(ctx, *gradients)
        return (*found[:lead], None, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function = type(f"Gradient_{name}", (torch.autograd.Function,), methods)
    _gradients[name] = torch_versions.apply_of(function)

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for argument in arguments[:lead]:
                if argument is not None and argument.requires_grad:
                    result = function.apply(*arguments[:lead], arguments[lead:], None)
                    return list(result) if returns_list else result
        with torch_versions.below_autograd():
            return op(*arguments)

    _LIBRARY.impl(name, kernel, "Autograd")


def _returns_list(name: str) -> bool:
    op = getattr(torch.ops.convnext_kernels, name)
    return isinstance(op.default._schema.returns[0].type, torch.ListType)


def _keep_nothing(ctx: Any, inputs: tuple, output: Any) -> None:
    pass


def _function(name: str, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """Op `name` with its gradient, as a Function that `torch.func` can transform."""
    op = getattr(torch.ops.convnext_kernels, name)
    returns_list = _returns_list(name)

    def forward(*arguments: Any) -> Any:
        result = op(*arguments)
        return tuple(result) if returns_list else result

    def gradient(ctx: Any, *gradients: Tensor | None) -> Any:
        return backward(ctx, list(gradients)) if returns_list else backward(ctx, *gradients)

    def no_forward_mode(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(f"{NAMESPACE}::{name} has no forward-mode derivative; use reverse mode (vjp, grad)")

    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        # One call for each element: weights may be batched as well as x, and each call launches its own kernel anyway.
        leaves, structure = tree_flatten(arguments)
        dims = broadcast_to_and_flatten(in_dims, structure)
        results = []
        for i in range(info.batch_size):
            slices = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
            results.append(function.apply(*tree_unflatten(slices, structure)))
        if returns_list:
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        return torch.stack(results), 0

    function = type(
        f"Transformable_{name}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(gradient),
            "jvp": staticmethod(no_forward_mode),
            "vmap": staticmethod(vmap),
        },
    )
    return function


def autocast(name: str, cast: Callable[..., tuple]) -> None:
    """Run op `name` under autocast with the arguments that ``cast(dtype, *arguments)`` returns."""
    _casts[name] = cast
    for device, key in _AUTOCAST.items():

        def kernel(*arguments: Any, device: str = device) -> Tensor | list[Tensor]:
            arguments = cast(torch.get_autocast_dtype(device), *arguments)
            with torch_versions.without_autocast_key(device):
                return getattr(torch.ops.convnext_kernels, name)(*arguments)

        _LIBRARY.impl(name, kernel, key)


def cast_tensors(dtype: torch.dtype, arguments: tuple) -> tuple:
    """Cast every floating tensor among `arguments` to `dtype`; fp64 stays, as in PyTorch's own autocast."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
        for a in arguments
    )


def gradients_like(tensors: list[Tensor | None], needs: list[bool]) -> list[Tensor]:
    """The fake kernel of every backward op: one gradient per needed tensor, with its shape, dtype and strides."""
    return [torch.empty_like(t) for t, needed in zip(tensors, needs, strict=True) if needed]


def scatter(gradients: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Return a gradient for every input: the computed ones in their places, None for the others."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs]
