"""Consecutive ConvNeXt blocks in one call, for inference.

No op of its own: what PyTorch sees are the blocks' own calls. This is a shorter way through them, for when nothing but
the backend wants to see them: one look at all parameters, one prepared program (GPU) or call of the extension (CPU).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convnext_kernels import calls, dispatch, torch_versions
from convnext_kernels.calls import Block, BlocksCall
from convnext_kernels.ops.block import check_block, spec_of
from convnext_kernels.ops.registration import on_device, replayed, served
from convnext_kernels.spec import MlpParameters
from convnext_kernels.variants import GELU, LAYER

__all__ = ["Block", "Blocks", "block", "snapshot"]


def block(
    weight: Tensor,
    bias: Tensor | None,
    *p: Tensor | None,
    dilation: tuple[int, int],
    eps: float,
    grn_eps: float,
    norm: str = LAYER,
    activation: str = GELU,
) -> Block:
    """A block with the tensors of `functional.convnext_block` in the order of its arguments, without drop_scale."""
    return Block(weight, bias, MlpParameters(*p), dilation, eps, grn_eps, norm, activation)


def snapshot(modules: list, attributes: list[dict], nested: list[dict], empty: list) -> Callable[[], bool] | None:
    """``holds`` of the extension's Snapshot (csrc/bindings/repeats.h); None without the extension."""
    extension = dispatch.cpu_extension()
    return None if extension is None else extension.Snapshot(modules, attributes, nested, empty).holds


class Blocks:
    """The parameters of consecutive blocks, which all request the same backend."""

    def __init__(self, blocks: Sequence[Block], backend: str) -> None:
        self.blocks, self.backend = tuple(blocks), backend
        every = [t for b in blocks for t in (b.weight, b.bias, *b.p)]
        self.tensors = [t for t in every if t is not None]
        self.options = (tuple(t is None for t in every), *(b[3:] for b in blocks))

    def run(self, x: Tensor) -> Tensor | None:
        """The result of the last block; None if the blocks must be called one by one."""
        arguments = (x, *self.tensors, self.options)
        result = calls.repeat("blocks", arguments)
        if result is not None:
            return result
        if torch_versions.watched() or torch_versions.forward_mode_active():
            return None
        inputs = calls.known("blocks", len(arguments) - 1, ((tuple,),), (), arguments)
        if inputs is None:
            return None
        result = replayed(inputs, self.backend, "sequence")
        if result is not NotImplemented:
            return result
        with torch_versions.below_autograd():
            kernel, compute_dtype = served(inputs, self.backend, lambda: self._find(x))
            return None if kernel is None else _run(inputs, x, kernel, self.blocks, compute_dtype)

    def _find(self, x: Tensor) -> tuple[Any, torch.dtype]:
        """The backend's module, and the dtype that it computes in; None if the blocks must be called one by one."""
        specs = set()
        for b in self.blocks:
            try:
                check_block(x, b.weight, b.bias, b.p, None, b.dilation, b[4:], False)
            except (TypeError, ValueError):
                return None, x.dtype  # the block's own call names what is wrong, or runs another library's forward
            specs.add(spec_of(x, b.weight, b.p, b.dilation, (b.norm, b.activation), None))
        if len(specs) > 1 or x.numel() == 0 or any(b.p.adaptive for b in self.blocks):
            return None, x.dtype
        spec = specs.pop()
        kernel = dispatch.choose(spec, self.backend, x, "nothing")
        return kernel if hasattr(kernel, "sequence") else None, spec.compute_dtype


@on_device
def _run(inputs: calls.Inputs, x: Tensor, kernel: Any, blocks: tuple[Block, ...], dtype: torch.dtype) -> Tensor:
    return kernel.sequence(BlocksCall(x, blocks, dtype, inputs))
