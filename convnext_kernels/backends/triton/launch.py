"""How kernels are launched. The only file that knows how Triton does it, from version 3.4 on.

``kernel[grid](...)`` binds its arguments and derives a key from each of them to find the compiled kernel: 20 to 30 us.
For a prepared call (`gpu/prepared.py`) the compiled kernel is known after the first launch, and later launches call its
launcher, which takes addresses as integers: 1 us, and 2 to 4 us of the driver.

The first way stays in use where there is no such launcher (the interpreter, drivers that emulate a GPU) and while
somebody has hooks on launches (profilers).
"""

import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver as drivers

from convnext_kernels import exporting
from convnext_kernels.backends.gpu import prepared as programs
from convnext_kernels.backends.gpu.prepared import View
from convnext_kernels.backends.triton import device

_INTERPRETED = device.interpreted()


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable:
    """``launch(kernel, grid)(...)`` is ``kernel[grid](...)``, or a step of the program that is being recorded.

    For `inline_kernels` it is a node of the graph that PyTorch traces.
    """
    dependent = _dependent(kernel)
    if exporting.traces_launches():
        return functools.partial(torch.library.wrap_triton(kernel)[grid], **dependent)
    recorder = programs.recorder()
    if recorder is None:
        call = functools.partial(kernel[grid], **dependent)
        return _with_scratch(call) if "TMA" in kernel.arg_names else call

    def record(*arguments: Any, **options: Any) -> None:
        recorder.steps.append(_Launch(recorder, kernel, grid, arguments, options | dependent))

    return record


def loadable(tile: dict, *tensors: Tensor) -> dict:
    """The configuration of a kernel that loads `tensors` through descriptors if it may: TMA needs 16-byte alignment.

    Graphs of `inline_kernels` have no memory for descriptors (`_with_scratch`), and there addresses are not known.
    """
    allowed = not exporting.traces_launches() and all(
        tensor.element_size() == 2 and programs.aligned(tensor, 16) for tensor in tensors
    )
    return tile if allowed else tile | {"TMA": 0}


def _scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=device.type_())


def _with_scratch(call: Callable) -> Callable:
    """`call`, whose kernel writes its descriptors to memory that Triton allocates for every launch: from PyTorch."""

    def run(*arguments: Any, **options: Any) -> Any:
        triton.set_allocator(_scratch)
        return call(*arguments, **options)

    return lambda *arguments, **options: contextvars.copy_context().run(run, *arguments, **options)


def _dependent(kernel: Any) -> dict[str, bool]:
    """The options of a kernel that waits by itself for the kernels before (`dependent.py`)."""
    if "PDL" not in kernel.arg_names:
        return {}
    if _INTERPRETED or exporting.traces_launches():
        return {"PDL": False}
    target = drivers.active.get_current_target()
    allowed = target.backend == "cuda" and target.arch >= 90
    return {"PDL": True, "launch_pdl": True} if allowed else {"PDL": False}


class _Launch:
    def __init__(self, recorder: programs.Recorder, kernel: Any, grid: tuple, arguments: tuple, options: dict) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        bound = dict(zip(parameters, arguments, strict=False))
        self.options = {name: value for name, value in options.items() if name not in parameters}
        bound |= {name: value for name, value in options.items() if name in parameters}
        self.compiled_for = tuple(
            value.dtype if isinstance(value, Tensor) else value for value in (bound[name] for name in parameters)
        )
        self.arguments = [
            recorder.view(value) if isinstance(value, Tensor) else value
            for value in (bound[name] for name in parameters)
        ]
        self.slots = tuple(a.slot for a in self.arguments if isinstance(a, View))
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.loads = bool(bound.get("TMA"))  # through descriptors
        self.launch = _with_scratch(kernel[self.grid]) if self.loads else kernel[self.grid]
        self.launcher: Callable | None = None

    def run(self, buffers: list, _addresses: list[int], _stream: int | None) -> None:
        arguments = [a.of(buffers) if type(a) is View else a for a in self.arguments]
        compiled = self.kernel[self.grid](*arguments, **self.options)
        # Triton's own launchers take addresses; those of an emulating driver need tensors.
        if compiled is not None and _takes_addresses(type(compiled.run)):
            self.function, self.packed = compiled.function, compiled.packed_metadata
            self.launcher = _with_scratch(compiled.run) if self.loads else compiled.run

    def write(self, code: programs.Code) -> None:
        """Call the compiled kernel's launcher with addresses."""
        parts = [code.constant(self.launcher), *map(str, self.grid), "stream"]
        parts += [code.constant(self.function), code.constant(self.packed), "None, None, None"]
        for a in self.arguments:
            if type(a) is not View:
                parts.append(code.constant(a))
            else:
                parts.append(f"a{a.slot} + {a.offset * a.itemsize}" if a.offset else f"a{a.slot}")
        launcher, *arguments = parts
        code.lines.append(f"{launcher}({', '.join(arguments)})")


@functools.cache
def _takes_addresses(launcher: type) -> bool:
    return any(base.__module__.startswith("triton.backends.") for base in launcher.__mro__)


def _hooked() -> bool:
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def _environment(_: Tensor) -> tuple[tuple, int | None]:
    """The driver and the current device, and the stream; None if launches must take Triton's own way."""
    if _INTERPRETED:
        return (), None
    driver = drivers.active
    device = driver.get_current_device()
    return (driver, device), None if _hooked() else driver.get_current_stream(device)


prepared = programs.preparing(_environment)
