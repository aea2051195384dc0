"""Views and strides for the eager ops: they compute in NHWC; their arguments and results are NCHW."""

import torch
from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    """View (N, H, W, C) as (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def like(result: Tensor, x: Tensor) -> Tensor:
    """Return `result` with the dtype and strides of `torch.empty_like(x)`, which the fake kernels promise."""
    return into(result, torch.empty_like(x))


def into(result: Tensor, out: Tensor) -> Tensor:
    """Return `result` if it has the dtype and strides of the empty tensor `out`, else `out` with its values."""
    if result.dtype == out.dtype and result.stride() == out.stride():
        return result
    return out.copy_(result)


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Give a parameter's gradient the parameter's shape, dtype and strides."""
    return like(gradient.reshape(parameter.shape), parameter)
