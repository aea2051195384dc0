"""CUDA graphs for inference: the launches of a model are captured once and replayed, without Python.

For training use PyTorch's own ``torch.cuda.make_graphed_callables(model, (x,))``: it captures the forward and the
backward pass, and the ops of this package can be captured in both. `convnext-kernels verify` runs both on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convnext_kernels.torch_versions import tree_map_only

WARMUP = 3  # calls before the capture: kernels are compiled, cuDNN and cuBLAS choose theirs and allocate workspaces


def _checked(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inputs = example if isinstance(example, tuple) else (example,)
    for i, x in enumerate(inputs):
        name = f"example[{i}]" if isinstance(example, tuple) else "example"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected one that does not: the graph computes none")
    if not inputs:
        raise ValueError("example: expected at least one tensor, got an empty tuple")
    if any(module.training for module in model.modules()):
        raise ValueError(
            "model: is in training mode, expected evaluation mode (model.eval()); for training use "
            "torch.cuda.make_graphed_callables"
        )
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model: its parameters require gradients, which the graph does not compute: call graphed inside "
            "torch.no_grad(), or model.requires_grad_(False) before"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("graphed: CUDA graphs need a GPU, and PyTorch finds none (torch.cuda.is_available())")
    for i, x in enumerate(inputs):
        if x.device.type != "cuda" or x.device != inputs[0].device:
            where = "a CUDA device" if i == 0 else f"{inputs[0].device}, as example[0]"
            raise ValueError(f"example[{i}]: expected a tensor on {where}, got {x.device}")
    for name, parameter in model.named_parameters():
        if parameter.device != inputs[0].device:
            raise ValueError(f"model: parameter {name} is on {parameter.device}, expected {inputs[0].device}")
    return inputs


def _captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, Callable[[], None]]:
    """The outputs that a replay fills, and the replay."""
    device = inputs[0].device
    # A weight that autocast has cast during the warm-up must not be a constant of the graph.
    autocast = torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
    )
    with torch.cuda.device(device), autocast:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                model(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = model(*inputs)
    return outputs, graph.replay


class Graphed:
    """A captured model, see `graphed`."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._model = model  # keeps the weights in memory: the graph reads them by address
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._weights = [(name, weight, weight.data_ptr()) for name, weight in tensors]
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = tuple(torch.empty_like(x).copy_(x) for x in inputs)
            self._outputs, self._replay = _captured(model, self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Copy `inputs` to the graph's, replay it and return copies of its outputs.

        Raises TypeError or ValueError for inputs that differ from the example in number, shape, dtype or device or
        that require a gradient, and RuntimeError if a weight has moved to another address since the capture.
        """
        if len(inputs) != len(self._inputs):
            raise TypeError(f"inputs: expected {len(self._inputs)}, as in the example, got {len(inputs)}")
        for i, (x, own) in enumerate(zip(inputs, self._inputs, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs[{i}]: expected a tensor, got {type(x).__name__}")
            if x.shape != own.shape or x.dtype != own.dtype or x.device != own.device:
                raise ValueError(
                    f"inputs[{i}]: expected {tuple(own.shape)} {own.dtype} on {own.device}, as in the example, got "
                    f"{tuple(x.shape)} {x.dtype} on {x.device}"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"inputs[{i}]: requires a gradient, which the graph does not compute")
        for name, weight, address in self._weights:
            if weight.data_ptr() != address:
                raise RuntimeError(f"{name} has other memory than when the graph was captured: call graphed again")
        with torch.no_grad():
            for own, x in zip(self._inputs, inputs, strict=True):
                own.copy_(x)
            self._replay()
            return tree_map_only(Tensor, torch.clone, self._outputs)


def graphed(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graphed:
    """Capture ``model(*example)`` as a CUDA graph and return a function that replays it, for inference.

    A replay costs the host some 10 us however many kernels the model has, so it pays where the GPU waits for Python:
    small batches.

    Args:
        model: in evaluation mode, on one GPU; no parameter requires a gradient, unless gradients are disabled.
        example: the input, or a tuple of inputs, on that GPU. Later inputs have the same shapes, dtypes and device.

    Returns a function of the inputs. It returns what the model returns, in new tensors. Autocast is as it was at the
    capture. Weights that are changed in place (``load_state_dict``, an optimiser's step, ``with torch.no_grad():
    weight.copy_(...)``) are seen. Weights whose memory is replaced (``model.to(...)``, ``weight.data = ...``) raise
    RuntimeError at the next call. Parameters that are replaced by others (``load_state_dict(..., assign=True)``) are
    not seen: call `graphed` again. Launches depend on shapes alone, so a model whose Python code depends on values
    must not be captured. Calls from several threads need a lock.

    Raises TypeError or ValueError for other arguments, and RuntimeError without a GPU.
    """
    return Graphed(model, _checked(model, example))
