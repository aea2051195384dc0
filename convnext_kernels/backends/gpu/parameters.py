"""Gradients of parameters from the partial sums that kernels write."""

from collections.abc import Callable

import torch
from torch import Tensor

from convnext_kernels.backends.gpu.layout import like_parameter


def gradients(sum_partials: Callable, partials: Tensor | None, parameters: tuple, needs: list[bool]) -> list[Tensor]:
    """Sum (parts, len(parameters), C) fp32 and return the gradients that `needs` marks, each like its parameter.

    `sum_partials(partials, dtype)` is the backend's function. Without partials (None) there are no gradients.
    """
    if partials is None:
        return []
    dtypes = {parameter.dtype for parameter, needed in zip(parameters, needs, strict=True) if needed}
    sums = sum_partials(partials, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    marked = zip(sums, parameters, needs, strict=True)
    return [like_parameter(g.to(parameter.dtype), parameter) for g, parameter, needed in marked if needed]
