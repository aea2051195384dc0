"""Checks of what users pass. Every message names the argument, what came and what was expected.

They run inside the ops, in the real and in the fake kernels, so that every call is checked.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from convnext_kernels import dispatch
from convnext_kernels.spec import BackendError
from convnext_kernels.variants import LAYER

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_KERNEL_SIZE = 51
MAX_KERNEL_SIZE_3D = 7
MEMORY = ("auto", "min", "balanced")


def _shape(t: Tensor) -> str:
    return "(" + ", ".join(f"{s}" for s in t.shape) + ")"  # str of a size that `torch.jit.trace` traces: "tensor(8)"


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _floating(name: str, x: object, axes: str) -> None:
    dimensions = axes.count(",") + 1
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions ({axes}), got {x.dim()} with shape {_shape(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def volume(name: str, x: object) -> None:
    """A floating (N, C, D, H, W) tensor with at least one channel and one pixel; N may be 0."""
    _floating(name, x, "N, C, D, H, W")
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1 or x.shape[4] < 1:
        raise ValueError(f"{name}: C, D, H and W must be at least 1, got shape {_shape(x)}")


def image(name: str, x: object) -> None:
    """A floating (N, C, H, W) tensor with at least one channel and one pixel; N may be 0."""
    _floating(name, x, "N, C, H, W")
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name}: C, H and W must be at least 1, got shape {_shape(x)}")


def sequence(name: str, x: object, axes: str = "N, C, L") -> None:
    """A floating (N, C, L) tensor, or with other `axes` (N, L, C), with at least one channel; N may be 0."""
    _floating(name, x, axes)
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name}: C and L must be at least 1, got shape {_shape(x)}")


def parameters(x: Tensor, named: Sequence[tuple[str, Tensor | None]], mixed_dtypes: bool = False) -> None:
    """All are on x's device and have its dtype, or, with `mixed_dtypes` (autocast), any floating dtype."""
    device, dtype = x.device, x.dtype
    for name, t in named:
        if t is None:
            continue
        if t.device != device:
            hint = "; load or allocate the weights first (load_state_dict(assign=True), to_empty)" if t.is_meta else ""
            raise ValueError(f"{name}: expected a tensor on x's device {device}, got one on {t.device}{hint}")
        if t.dtype != dtype and (not mixed_dtypes or t.dtype not in FLOATING):
            raise TypeError(f"{name}: expected x's dtype {dtype}, got {t.dtype}")


def channels(x: Tensor, *parameters: tuple[str, Tensor | None, int | None], axis: int = 1) -> None:
    """If several parameters agree on a number of channels and x has another one, the mistake is likely x.

    `parameters`: (name, tensor, the axis of its channels; None: each element is one). `axis`: that of x.
    """
    given = [(name, t, of) for name, t, of in parameters if t is not None and (of is None or t.dim() > of)]
    counts = [t.numel() if of is None else t.shape[of] for _, t, of in given]
    if len(counts) > 1 and counts[0] != x.shape[axis] and all(count == counts[0] for count in counts):
        *names, last = (name for name, *_ in given)
        raise ValueError(f"x: expected {counts[0]} channels, as {', '.join(names)} and {last} have, got {_shape(x)}")


def vector(name: str, t: Tensor | None, length: int, of: str) -> None:
    """A tensor of any shape with `length` elements."""
    if t is not None and t.numel() != length:
        raise ValueError(f"{name}: expected {length} elements ({of}), got {t.numel()} with shape {_shape(t)}")


def per_sample(name: str, t: object, x: Tensor) -> None:
    """A tensor with one number per channel of x (N, C, ...), or (N, C): with those of each sample."""
    channels = x.shape[1]
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.numel() != channels and t.shape != x.shape[:2]:
        raise ValueError(f"{name}: expected shape ({channels},) or {_shape(x[..., 0, 0])}, got {_shape(t)}")


def kernel_size(name: str, *sides: int) -> None:
    """All odd, from 1 to MAX_KERNEL_SIZE; of (depth, height, width) to MAX_KERNEL_SIZE_3D."""
    most = MAX_KERNEL_SIZE_3D if len(sides) == 3 else MAX_KERNEL_SIZE
    for side in sides:
        if side % 2 == 0 or not 1 <= side <= most:
            got = side if all(side == other for other in sides) else "x".join(str(other) for other in sides)
            wanted = "an odd kernel size" if len(sides) == 1 else "odd kernel sizes"
            raise ValueError(f"{name}: expected {wanted} from 1 to {most}, got {got}")


def depthwise_weight(name: str, weight: Tensor, channels: int, axes: str = "KH, KW") -> None:
    """A (C, 1, KH, KW) tensor with sides that `kernel_size` allows; other `axes`: (C, 1, K), (C, 1, KD, KH, KW)."""
    if weight.dim() != 3 + axes.count(",") or weight.shape[0] != channels or weight.shape[1] != 1:
        wanted = f"({channels}, 1, {axes})"
        raise ValueError(f"{name}: expected shape {wanted} for x with C={channels}, got {_shape(weight)}")
    kernel_size(name, *weight.shape[2:])


def sequence_weight(name: str, weight: object, x: Tensor, *others: tuple, axis: int = 1) -> None:
    """The same for sequences, (C, 1, K); the op, which sees images of one row, checks its dtype and device.

    `others` and `axis` as in `channels`.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
    if weight.shape[:1] != (x.shape[axis],):
        channels(x, (name, weight, 0), *others, axis=axis)
    depthwise_weight(name, weight, x.shape[axis], "K")


def one(name: str, value: object) -> int:
    """The number itself; torch.nn's convolutions take one for each axis too. The op checks its type and size."""
    if isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected one integer, got {value!r}")
    return value


def pair(name: str, value: object) -> tuple:
    """(of height, of width) from a pair or one value for both. ValueError for a sequence of another length."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected one integer or two, for height and width, got {value!r}")
    return tuple(value)


def triple(name: str, value: object) -> tuple:
    """(of depth, of height, of width) from a triple or one value for all. ValueError for another length."""
    if not isinstance(value, (tuple, list)):
        return value, value, value
    if len(value) != 3:
        raise ValueError(f"{name}: expected one integer or three, for depth, height and width, got {value!r}")
    return tuple(value)


def stride(value: int) -> None:
    """1 or 2."""
    if value not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {value}")


def dilation(value: int) -> None:
    """An integer of at least 1."""
    if value < 1:
        raise ValueError(f"dilation: expected an integer of at least 1, got {value}")


def number(name: str, value: object) -> None:
    """A Python number that is not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def epsilon(name: str, value: float) -> None:
    """A finite number, not negative."""
    number(name, value)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def pointwise_weight(name: str, weight: Tensor, rows: int | None, columns: int, columns_are: str) -> None:
    """A Linear weight (out, in) or the same as a 1x1 convolution (out, in, 1, 1)."""
    matrix = weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2] == 1 and weight.shape[3] == 1)
    if not matrix:
        raise ValueError(f"{name}: expected shape (out, in) or (out, in, 1, 1), got {_shape(weight)}")
    if weight.shape[0] < 1 or (rows is not None and weight.shape[0] != rows) or weight.shape[1] != columns:
        wanted = f"({rows if rows is not None else 'hidden'}, {columns})"
        raise ValueError(f"{name}: expected {wanted}, where {columns} is {columns_are}, got {_shape(weight)}")


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """One of some names. TypeError for anything but a string, ValueError for another one."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def norm_bias(name: str, bias: Tensor | None, channels: int, norm: str) -> None:
    """LayerNorm has a bias, the other norms have none; SimpleNorm's variance needs two channels."""
    if norm != LAYER and bias is not None:
        raise ValueError(f"{name}: expected None with norm={norm!r}, got shape {_shape(bias)}")
    if norm == LAYER and bias is None:
        raise ValueError(f"{name}: expected a tensor with norm={norm!r}, got None")
    vector(name, bias, channels, "one per channel of x")
    if norm == "simple" and channels < 2:
        raise ValueError(f"norm: 'simple' divides by C - 1, so it needs at least 2 channels, got {channels}")


def memory(value: str, nothing: bool = True) -> None:
    """What a forward pass keeps for its gradient; `nothing` also allows "nothing", for passes without a gradient."""
    if value not in MEMORY and not (nothing and value == "nothing"):
        raise ValueError(f"memory: expected one of {', '.join(map(repr, MEMORY))}, got {value!r}")


def same_shape(name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """A tensor of x's shape (residuals, incoming gradients), or of another tensor's, which is called `of`."""
    if t.shape != x.shape:
        raise ValueError(f"{name}: expected {of}'s shape {_shape(x)}, got {_shape(t)}")


def gradient(name: str, t: object, output: Tensor) -> None:
    """The incoming gradient: a tensor of the output's shape, dtype and device (`output` may be on "meta")."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.shape != output.shape:
        raise ValueError(f"{name}: expected the output's shape {_shape(output)}, got {_shape(t)}")
    if t.dtype != output.dtype:
        raise TypeError(f"{name}: expected {_dtype(output)}, got {_dtype(t)}")


def same_device(name: str, t: Tensor, x: Tensor) -> None:
    """A tensor on x's device."""
    if t.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device}, got one on {t.device}")


def saved(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """What the forward pass kept: a first part of `expected`, dense; images in channels_last."""
    if len(tensors) > len(expected):
        raise ValueError(f"saved: expected at most {len(expected)} tensors, got {len(tensors)}")
    for i, (t, like) in enumerate(zip(tensors, expected, strict=False)):
        memory_format = torch.channels_last if like.dim() == 4 else torch.contiguous_format
        if t.shape != like.shape or not t.is_contiguous(memory_format=memory_format):
            layout = "in channels_last" if like.dim() == 4 else "dense"
            raise ValueError(f"saved[{i}]: expected {_shape(like)} {layout}, got {_shape(t)}")
        if t.dtype != like.dtype:
            raise TypeError(f"saved[{i}]: expected {_dtype(like)}, got {_dtype(t)}")


def patch_weight(name: str, weight: Tensor, x: Tensor) -> None:
    """A (D, C, K, K) tensor whose KxK patches fit into x at least once."""
    channels, height, width = x.shape[1:]
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (D, {channels}, K, K) for x with C={channels}, got {_shape(weight)}")
    if weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{name}: expected a square kernel, got {weight.shape[2]}x{weight.shape[3]}")
    if weight.shape[2] < 1:
        raise ValueError(f"{name}: expected a kernel size of at least 1, got {weight.shape[2]}")
    # min(height, width) would make compiled graphs depend on which is less
    if weight.shape[2] > height or weight.shape[2] > width:
        raise ValueError(f"{name}: a {weight.shape[2]}x{weight.shape[2]} patch does not fit into x {_shape(x)}")


def backend(value: object, available: bool = False) -> None:
    """Accept "auto" or the name of a backend. `available` also refuses a backend that cannot run on this machine."""
    dispatch.check_name(value, "backend")
    if available and value != dispatch.AUTO:
        status = dispatch.list_backends()[value]
        if not status.available:
            raise BackendError(f"backend: {value!r} is not available: {status.reason}")


def widens() -> bool:
    """Whether a convolution of bf16 is faster in fp32 on this CPU: see `nn.layers.widened`."""
    return not dispatch.cpu_multiplies_bf16()
