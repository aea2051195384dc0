"""What the Triton backend would run for a model on a GPU, and the predicted time. No GPU is needed.

Every figure comes from the cost model (`tuning.cost`) and from counting; nothing runs. There are three columns:

- ours: the launches of the plans that the backend chooses;
- eager: PyTorch op by op, by the same cost model, with ideal kernels: a lower bound of eager's time;
- limit: one dwconv kernel and one mlp kernel per block (in training also two kernels for the gradients of dwconv and
  one for those of mlp) at the GPU's peak rates: a lower bound of the time of these kernels, without their launches.
  Where the plan is one kernel for the whole block, the limit is that of one kernel, too.

The layers that this package does not replace (stem, head) have the same figures in all columns.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from convnext_kernels.backends import op_module
from convnext_kernels.dispatch import RECOMPUTED_CHANNELS
from convnext_kernels.torch_versions import TorchDispatchMode, tree_leaves
from convnext_kernels.tuning import Candidate, Gpu, Work, cublas_product, seconds
from convnext_kernels.tuning.cost import CUBLAS_SHARE

NAMESPACE = "convnext_kernels"
OTHER = "other layers"
# Elements that eager's operators read and write for each element of GRN's input, launch by launch.
GRN_ELEMENTS = (1, 0, 0, 0, 2, 2, 3)
GRN_BACKWARD_ELEMENTS = (3, 3, 3, 2, 2, 3, 2)
_MANY = 2**20  # programs: enough to fill every wave


def _sides(of: tuple[int, int]) -> str:
    height, width = of
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class Call:
    """One op of this package as a model calls it."""

    op: str
    shape: tuple[int, int, int, int]  # of x: N, C, H, W
    hidden: int = 0  # channels of the hidden; for "downsample" channels of the result
    kernel: tuple[int, int] = (0, 0)  # height and width, of the depthwise kernel; for "downsample" of the patches
    dilation: tuple[int, int] = (1, 1)
    stride: int = 1
    grn: bool = False

    @property
    def taps(self) -> int:
        """Of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def convolution(self) -> str:
        """Kernel, dilation and stride in a few letters, such as "k7", "k1x11 d2" or "k7 s2"; empty without a kernel."""
        if not self.taps:
            return ""
        parts = [f"k{_sides(self.kernel)}"]
        if max(self.dilation) > 1:
            parts.append(f"d{_sides(self.dilation)}")
        if self.stride > 1:
            parts.append(f"s{self.stride}")
        return " ".join(parts)

    def __str__(self) -> str:
        _, c, h, w = self.shape
        parts = [f"{self.op}{' V2' if self.grn else ''} {c} x {h} x {w}"]
        return " ".join([*parts, *filter(None, [self.convolution])])


@dataclass
class Recording:
    """The ops of one forward pass."""

    calls: Counter[Call] = field(default_factory=Counter)
    others: list[tuple[int, int]] = field(default_factory=list)  # (elements moved, FLOPs) of each kernel of PyTorch


@dataclass(frozen=True)
class Cost:
    """A predicted cost."""

    launches: int = 0
    bytes: float = 0.0  # read from and written to device memory, each byte once
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.launches + other.launches, self.bytes + other.bytes, self.seconds + other.seconds)

    def __mul__(self, count: int) -> "Cost":
        return Cost(self.launches * count, self.bytes * count, self.seconds * count)


@dataclass(frozen=True)
class Row:
    """All calls of one kind; costs are those of all of them together."""

    name: str
    count: int
    plan: tuple[str, ...]  # "step: configuration", or the step if there is only one configuration
    ours: Cost
    eager: Cost
    limit: Cost


class _Recorder(TorchDispatchMode):
    """Records this package's ops, and the elements and FLOPs of all other kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
            self.recording.calls[called(func._schema.name.partition("::")[2], named)] += 1
        elif not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            counted = flop_registry.get(func.overloadpacket)
            flops = counted(*args, **kwargs, out_val=result) if counted else 0
            if elements := sum(t.numel() for t in tensors):
                self.recording.others.append((elements, flops))
        return result


def called(op: str, named: dict[str, Any]) -> Call:
    """The call of `op` with these arguments, by their names in its schema."""
    weight = named.get("dwconv_weight" if op == "block" else "weight")
    kernel = tuple(weight.shape[2:]) if op in ("block", "dwconv", "downsample") else (0, 0)
    dilation = (named.get("dilation_h", 1), named.get("dilation_w", 1))
    hidden = weight.shape[0] if op == "downsample" else 0
    if op in ("block", "mlp"):
        hidden = named["pwconv1_weight"].shape[0]
    grn = named.get("grn_weight") is not None
    return Call(op, tuple(named["x"].shape), hidden, kernel, dilation, named.get("stride", 1), grn)


def record(model: nn.Module, shape: Sequence[int]) -> Recording:
    """Run an accelerated fp32 model on "meta" with an input of `shape` and record its ops; nothing is computed."""
    x = torch.empty(tuple(shape), device="meta").to(memory_format=torch.channels_last)
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model(x)
    return recorder.recording


def _work(size: float, flops: float = 0.0, dtype: torch.dtype = torch.bfloat16, fma: float = 0.0) -> Work:
    """A launch with ideal tiles; fp32 matmuls run on the fp32 lanes, which is PyTorch's default."""
    flops /= CUBLAS_SHARE
    tensor = flops if dtype.itemsize == 2 else 0.0
    lanes = fma + (flops / 2 if dtype.itemsize != 2 else 0.0)
    return Work(dram_bytes=size, tensor_flops=tensor, fp32_ops=lanes, programs=_MANY, ctas_per_sm=8)


def _products(rows: int, inner: int, outer: int, dtype: torch.dtype, gpu: Gpu) -> tuple[Work, Work, Work]:
    """The matmuls of a Linear: forward, dgrad and wgrad."""
    size = dtype.itemsize
    return (
        cublas_product(rows, inner, outer, size, gpu),
        cublas_product(rows, outer, inner, size, gpu),
        cublas_product(outer, rows, inner, size, gpu),
    )


def _eager(call: Call, dtype: torch.dtype, training: bool, gpu: Gpu) -> list[Work]:
    """The launches of eager PyTorch, with the bytes that its operators read and write."""
    n, c, h, w = call.shape
    pixels = n * h * w
    unit = pixels * c * dtype.itemsize  # bytes of x
    wide = call.hidden / c
    convolution = _work(unit + unit / call.stride**2, fma=pixels / call.stride**2 * c * call.taps)
    # norm, mean, + eps, division, multiplication, addcmul, sum; then their gradients
    grn, grn_backward = ([_work(s * wide * unit) for s in sizes] for sizes in (GRN_ELEMENTS, GRN_BACKWARD_ELEMENTS))
    norm, norm_backward = [_work(2 * unit)], [_work(3 * unit), _work(2 * unit)]  # input, parameters
    forward, backward = [], []
    if call.op in ("block", "dwconv"):
        forward.append(convolution)
        backward += [convolution, convolution, _work(unit)]  # input, weight, bias
    if call.op == "layernorm":
        forward, backward = norm, norm_backward
    if call.op == "grn":
        forward, backward = ([_work(s * unit) for s in sizes] for sizes in (GRN_ELEMENTS, GRN_BACKWARD_ELEMENTS))
    if call.op == "downsample":
        patches = pixels // call.taps
        product, *gradients = _products(patches, c * call.taps, call.hidden, dtype, gpu)
        forward = [*norm, product]
        backward = [*gradients, _work(patches * call.hidden * dtype.itemsize), *norm_backward]
    if call.op in ("block", "mlp"):
        first, *first_gradients = _products(pixels, c, call.hidden, dtype, gpu)
        second, *second_gradients = _products(pixels, call.hidden, c, dtype, gpu)
        gelu, gelu_backward = _work(2 * wide * unit), _work(3 * wide * unit)
        gamma = [] if call.grn else [_work(2 * unit)]
        # for gamma's input; for gamma itself a multiplication and a sum
        gamma_backward = [] if call.grn else [_work(2 * unit), _work(3 * unit), _work(unit)]
        residual = _work(3 * unit)  # forward: the addition; backward: the addition of the two gradients of x
        forward += [*norm, first, gelu, *(grn if call.grn else []), second, *gamma, residual]
        backward += [*gamma_backward, *second_gradients, _work(unit), *(grn_backward if call.grn else [])]
        backward += [gelu_backward, *first_gradients, _work(wide * unit), *norm_backward, residual]
    return forward + backward if training else forward


def _limit(call: Call, dtype: torch.dtype, training: bool, gpu: Gpu, whole: bool) -> Cost:
    """The cost at peak rates if the two kernels move every byte once; or the one, if `whole`."""
    n, c, h, w = call.shape
    pixels = n * h * w
    unit = pixels * c * dtype.itemsize
    product = 2 * pixels * c * call.hidden
    parts: list[tuple[float, float, float]] = []  # bytes, flops, multiply-adds on the fp32 lanes
    if call.op in ("block", "dwconv"):
        outputs = pixels / call.stride**2
        parts += [(unit + unit / call.stride**2, 0.0, outputs * c * call.taps)] * (3 if training else 1)
    if call.op in ("block", "mlp"):
        parts.append(((4 if call.grn else 3) * unit, 2 * product, 0.0))
        if training:
            parts.append(((4 if call.grn else 3) * unit, 4 * product, 0.0))
    if call.op in ("layernorm", "grn"):
        parts += [(2 * unit, 0.0, 0.0)] + ([(3 * unit, 0.0, 0.0)] if training else [])
    if call.op == "downsample":
        size = unit * (1 + call.hidden / (c * call.taps))
        parts += [(size, product, 0.0)] + ([(size + unit, 2 * product, 0.0)] if training else [])
    if whole:
        parts = [(2 * unit, sum(flops for _, flops, _ in parts), sum(fma for _, _, fma in parts))]
    total = 0.0
    for size, flops, fma in parts:
        tensor, lanes = (flops, fma) if dtype.itemsize == 2 else (0.0, fma + flops / 2)
        rates = gpu.dram_gbs * 1e9, gpu.half_tflops * 1e12, gpu.fp32_tflops / 2 * 1e12
        total += max(amount / rate for amount, rate in zip((size, tensor, lanes), rates, strict=True))
    return Cost(0, sum(size for size, _, _ in parts), total)


def _ours(call: Call, dtype: torch.dtype, training: bool, gpu: Gpu) -> list[tuple[str, Candidate]]:
    """The launches of the Triton backend for this call, step by step."""
    plans = op_module("triton", "plans")
    if call.op == "layernorm":
        return plans.layernorm(call.shape, dtype, training)
    if call.op == "grn":
        return plans.grn(call.shape, dtype, training)
    if call.op == "downsample":
        return plans.downsample(call.shape, call.hidden, call.kernel[0], dtype, training, gpu)
    if call.op == "block" and not (training or call.grn) and call.dilation == (1, 1):
        whole = plans.whole_block(call.shape, call.hidden, call.kernel, dtype, gpu)
        if whole:
            return whole
    steps = []
    if call.op in ("block", "dwconv"):
        steps += plans.dwconv(call.shape, call.kernel, call.dilation, call.stride, dtype, training, gpu)
    if call.op in ("block", "mlp"):
        keeps_hidden = call.shape[1] > RECOMPUTED_CHANNELS  # as with memory="auto"
        steps += plans.mlp(call.shape, call.hidden, call.grn, dtype, training, keeps_hidden, gpu)
    return steps


def total(launches: Iterable[Work], gpu: Gpu) -> Cost:
    """Cost of launches that run one after the other."""
    cost = Cost()
    for work in launches:
        cost += Cost(1, work.dram_bytes, seconds(work, gpu))
    return cost


def explain(recording: Recording, dtype: torch.dtype, training: bool, gpu: Gpu) -> list[Row]:
    """A row for every kind of call, in the model's order, then a row for the layers that are not replaced."""
    rows = []
    for call, count in recording.calls.items():
        steps = _ours(call, dtype, training, gpu)
        ours = total((work for _, candidate in steps for work in candidate.launches), gpu)
        eager = total(_eager(call, dtype, training, gpu), gpu)
        limit = _limit(call, dtype, training, gpu, whole=steps[0][0] == "block")
        plan = tuple(step if step == c.name else f"{step}: {c.name}" for step, c in steps)
        rows.append(Row(str(call), count, plan, ours * count, eager * count, limit * count))
    # In training each matmul has two more for its gradients, each with about as many bytes.
    works = [_work(elements * dtype.itemsize, flops, dtype) for elements, flops in recording.others]
    others = total(works, gpu) * (3 if training else 1)
    if others.launches:
        rows.append(Row(OTHER, 1, ("PyTorch's own kernels",), others, others, others))
    return rows
