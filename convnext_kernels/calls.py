"""One call of an op, as it is passed from the op's boundary to a backend's kernels.

Every op has a named tuple with its tensors and options in the order of the op's schema. (Tuples and not dataclasses:
one is made at every call, and making it takes 0.7 us less.) At the boundary (`ops/registration.py`) the call's facts
(shapes, strides, dtypes, devices, 16-byte alignment, options) are looked up once: equal facts give the same
`Signature`, which keeps what was found out about them, from the checks' result to the prepared launches of a GPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, dtype

from convnext_kernels import torch_versions
from convnext_kernels.spec import MlpParameters

SIGNATURES = 1024  # that are remembered; of more, those not used for the longest time are dropped
LIKE = 8  # calls with the same options and shape of x that are told apart by other facts


class Signature:
    """The facts of a call, interned: there is one object for equal facts. `memo` holds what depends on them alone."""

    __slots__ = ("memo",)

    def __init__(self) -> None:
        self.memo: dict[Any, Any] = {}


@functools.lru_cache(maxsize=SIGNATURES)
def _interned(facts: tuple) -> Signature:
    return Signature()


class Repeated(NamedTuple):
    """A call that is like an earlier one."""

    op: str
    arguments: tuple  # the first `lead` are tensors or None
    lead: int
    same: Callable[..., bool]  # whether other tensors are like those of the call


class Inputs(NamedTuple):
    """The tensors of a call in the order of the schema, without those that are None, and their signature."""

    signature: Signature
    tensors: list[Tensor]
    addresses: list[int]
    # Only `known` fills these:
    requires_grad: bool = False  # of one of the tensors
    repeated: Repeated | None = None


# Functions of what a call depends on beside its arguments, the settings of the thread and of the process. Modules with
# such settings add theirs.
SETTINGS: list[Callable[[], object]] = [torch.is_grad_enabled, torch.get_num_threads, *torch_versions.SETTINGS]


def never(op: str, arguments: tuple) -> None:
    """No call was like this one."""


# The result of a call of `op` that is like an earlier one in everything, the settings and the values of parameters too,
# else None. A backend that keeps what it prepared may put its function here: csrc/bindings/repeats.h.
repeat: Callable[[str, tuple], Tensor | None] = never


def _add(values: Sequence[Any], tensors: list[Tensor], addresses: list[int], facts: list[Any]) -> None:
    # Not a function inside `inputs`: one that calls itself is a cycle, which would keep the tensors until Python's
    # garbage collector runs.
    for value in values:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            tensors.append(value)
            addresses.append(address)
            # of the device the index, and whether there is memory at all: on "meta" there is none
            where = address % 16 if address else -1
            facts.append((value.shape, value.stride(), value.dtype, value.get_device(), where))
        elif type(value) is list:
            facts.append(len(value))
            _add(value, tensors, addresses, facts)
        else:
            facts.append(value)


def inputs(op: str, arguments: Sequence[Any]) -> Inputs:
    """The inputs of a call of `op` with the arguments of its schema."""
    tensors: list[Tensor] = []
    addresses: list[int] = []
    facts: list[Any] = [op, arguments[0].device if isinstance(arguments[0], Tensor) else None]
    _add(arguments, tensors, addresses, facts)
    return Inputs(_interned(tuple(facts)), tensors, addresses)


class _Known(NamedTuple):
    same: Callable[..., bool]  # whether other tensors are like those of the call
    alignment: list[int]
    parameters: list[int]  # addresses of the tensors after the first in the last call
    signature: Signature
    requires_grad: bool


_known: dict[tuple, list[_Known]] = {}


def known(
    op: str, lead: int, types: Sequence[tuple[type, ...]], lists: Sequence[int], arguments: tuple
) -> Inputs | None:
    """`inputs` of a call whose tensors no mode, transform or subclass wants to see (`torch_versions.plain`), else None.

    The first `lead` arguments are tensors or None, the others must have `types`; `lists` says which may be lists.
    A call that is like an earlier one costs half of `inputs`: what PyTorch's dispatcher and a kernel can tell apart is
    compared in C++ instead of collected in Python.
    """
    tensors = [a for a in arguments[:lead] if a is not None]
    options = arguments[lead:]
    try:
        if lists:
            hashable = list(options)
            for i in lists:
                hashable[i] = _hashable(options[i], tensors)
            options = tuple(hashable)
        key = (op, tensors[0].shape, tuple(map(type, arguments)), options)
        likely = _known.get(key, ())
    except (AttributeError, IndexError, TypeError):  # a wrong argument: PyTorch's dispatcher names it
        return None
    for found in likely:
        if found.same(*tensors):
            addresses = list(map(Tensor.data_ptr, tensors))
            moved = addresses[1:] != found.parameters or addresses[0] & 15 != found.alignment[0]
            if moved and [address & 15 for address in addresses] != found.alignment:
                continue
            found.parameters[:] = addresses[1:]
            repeated = Repeated(op, arguments, lead, found.same)
            return Inputs(found.signature, tensors, addresses, found.requires_grad, repeated)
    if not torch_versions.plain(tensors):
        return None
    if any(type(value) not in allowed for value, allowed in zip(arguments[lead:], types, strict=True)):
        return None  # PyTorch's dispatcher converts it
    made = inputs(op, arguments)
    requires_grad = any(tensor.requires_grad for tensor in tensors)
    if len(set(map(id, tensors))) == len(tensors):  # otherwise `same` is always false
        same = torch_versions.same_facts(tensors)
        if len(_known) >= SIGNATURES:
            _known.clear()
        alignment = [address & 15 for address in made.addresses]
        _known[key] = [_Known(same, alignment, made.addresses[1:], made.signature, requires_grad), *likely][:LIKE]
    return made._replace(requires_grad=requires_grad)


def _hashable(option: Any, tensors: list[Tensor]) -> Any:
    if type(option) is not list:
        return option
    if option and isinstance(option[0], Tensor):
        tensors += option
        return len(option)
    return tuple(option)


def forget() -> None:
    """Drop everything that is remembered about calls."""
    global repeat
    _interned.cache_clear()
    _known.clear()
    repeat = never


class DwconvCall(NamedTuple):
    """Depthwise convolution of x (N, C, H, W) with weight (C, 1, KH, KW)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dilation: tuple[int, int]  # of height and width
    stride: int
    compute_dtype: dtype
    inputs: Inputs | None = None

    def result(self) -> Tensor:
        """An empty tensor for the result, (N, C, ceil(H / stride), ceil(W / stride)), with the strides it must have."""
        return convolved(self.x, self.stride)


class Dwconv3dCall(NamedTuple):
    """Depthwise convolution of x (N, C, D, H, W) with weight (C, 1, KD, KH, KW)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int
    compute_dtype: dtype
    inputs: Inputs | None = None

    @property
    def dilation(self) -> tuple[int, int]:
        """As a `DwconvCall` has it."""
        return (1, 1)

    def result(self) -> Tensor:
        """As of a `DwconvCall`; D becomes ceil(D / stride)."""
        return convolved(self.x, self.stride)


class Dwconv3dTransposedCall(NamedTuple):
    """Depthwise transposed convolution of x (N, C, D, H, W) with weight (C, 1, KD, KH, KW) and stride 2."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    output_padding: int
    compute_dtype: dtype
    inputs: Inputs | None = None

    def result(self) -> Tensor:
        """An empty tensor for the result: the volume whose convolution with stride 2 has x's size."""
        n, c, *sizes = self.x.shape
        return _in_format_of(self.x, (n, c, *(2 * size - 1 + self.output_padding for size in sizes)), self.x.dtype)

    def convolution(self, larger: Tensor) -> Dwconv3dCall:
        """The convolution of the result, or its gradient, whose input gradient this is."""
        return Dwconv3dCall(larger, self.weight, None, 2, self.compute_dtype)


def convolved(x: Tensor, stride: int) -> Tensor:
    """An empty tensor for the depthwise convolution of x."""
    if stride == 1:
        return torch.empty_like(x)
    n, c, *sizes = x.shape
    return _in_format_of(x, (n, c, *((size - 1) // stride + 1 for size in sizes)), x.dtype)


class NormCall(NamedTuple):
    """`layernorm` or `grn` of x (N, C, H, W)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    norm: str = "layer"  # of `variants.NORMS`
    inputs: Inputs | None = None


class MlpCall(NamedTuple):
    """The inverted bottleneck of x (N, C, H, W)."""

    x: Tensor
    residual: Tensor | None
    p: MlpParameters
    drop_scale: Tensor | None
    eps: float
    grn_eps: float
    norm: str  # of `variants.NORMS`
    activation: str  # of `variants.ACTIVATIONS`
    compute_dtype: dtype
    inputs: Inputs | None = None


class BlockCall(NamedTuple):
    """The ConvNeXt block of x (N, C, H, W)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    p: MlpParameters
    drop_scale: Tensor | None
    dilation: tuple[int, int]  # of height and width
    eps: float
    grn_eps: float
    norm: str
    activation: str
    compute_dtype: dtype
    inputs: Inputs | None = None

    @property
    def convolution(self) -> DwconvCall:
        """The block's depthwise convolution."""
        return DwconvCall(self.x, self.weight, self.bias, self.dilation, 1, self.compute_dtype)

    def mlp(self, y: Tensor, residual: Tensor | None) -> MlpCall:
        """The block's inverted bottleneck of the convolution's result."""
        options = self.eps, self.grn_eps, self.norm, self.activation
        return MlpCall(y, residual, self.p, self.drop_scale, *options, self.compute_dtype)


class Block(NamedTuple):
    """The parameters of one of several consecutive blocks."""

    weight: Tensor
    bias: Tensor | None
    p: MlpParameters
    dilation: tuple[int, int]
    eps: float
    grn_eps: float
    norm: str
    activation: str


class BlocksCall(NamedTuple):
    """Consecutive ConvNeXt blocks of one shape, for inference; x (N, C, H, W) is the input of the first."""

    x: Tensor
    blocks: tuple[Block, ...]
    compute_dtype: dtype
    inputs: Inputs | None = None

    def block(self, i: int, x: Tensor) -> BlockCall:
        """The call of block `i` with input x."""
        weight, bias, p, *options = self.blocks[i]
        return BlockCall(x, weight, bias, p, None, *options, self.compute_dtype)


class DownsampleCall(NamedTuple):
    """The norm of x (N, C, H, W), then a convolution with weight (D, C, K, K) and stride K."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    norm: str  # of `variants.NORMS`
    compute_dtype: dtype
    inputs: Inputs | None = None

    def result(self) -> Tensor:
        """An empty tensor for the result, (N, D, H // K, W // K), in x's memory format."""
        return downsampled(self.x, self.weight, self.compute_dtype)


def downsampled(x: Tensor, weight: Tensor, compute_dtype: dtype) -> Tensor:
    """An empty tensor for the downsampling of x."""
    side = weight.shape[-1]
    return _in_format_of(x, (x.shape[0], weight.shape[0], x.shape[2] // side, x.shape[3] // side), compute_dtype)


def _in_format_of(x: Tensor, shape: tuple[int, ...], dtype: dtype) -> Tensor:
    memory_format = torch_versions.suggest_memory_format(x)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
