"""The `torch.library` registrations that every op shares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "convnext_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # kept alive: registrations end with the object


def on_device(implementation: Callable) -> Callable:
    """Make the GPU of the first argument the current one, as PyTorch's own operators do: kernels launch on that."""

    def run(first: Tensor, *rest: Any) -> Any:
        elsewhere = not isinstance(first, Tensor) or not first.is_cuda  # None is for the implementation to name
        if elsewhere or first.device.index == torch.cuda.current_device():
            return implementation(first, *rest)
        with torch.cuda.device(first.device):
            return implementation(first, *rest)

    return run


def define(name: str, arguments: str, result: str, implementation: Callable, fake: Callable) -> None:
    """Define ``convnext_kernels::<name>`` with one implementation for all devices and its fake kernel."""
    LIBRARY.define(f"{name}({arguments}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_device(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    """Attach the gradient of op `name`, and a clear error for the gradient of that gradient."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)

    def no_double_backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"convnext_kernels::{name} cannot be differentiated twice; for second derivatives use the model "
            "before accelerate(), or restore(model)"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", no_double_backward, lib=LIBRARY)


def autocast(name: str, cast: Callable[..., tuple]) -> None:
    """Run op `name` under autocast with the arguments that ``cast(dtype, *arguments)`` returns."""
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*arguments: Any, device: str = device, key: str = key) -> Tensor | list[Tensor]:
            arguments = cast(torch.get_autocast_dtype(device), *arguments)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return getattr(torch.ops.convnext_kernels, name)(*arguments)

        LIBRARY.impl(name, kernel, key)


def cast_tensors(dtype: torch.dtype, arguments: tuple) -> tuple:
    """Cast every floating tensor among `arguments` to `dtype`; fp64 stays, as in PyTorch's own autocast."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
        for a in arguments
    )


def gradients_like(tensors: list[Tensor | None], needs: list[bool]) -> list[Tensor]:
    """Fake of every backward op: one gradient per needed tensor, with its shape, dtype and strides."""
    return [torch.empty_like(t) for t, needed in zip(tensors, needs, strict=True) if needed]


def scatter(gradients: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Put the gradients that were computed back in the places of the inputs they belong to."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs]
