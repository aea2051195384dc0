"""Kernels on a kind of hardware that nobody has run them on: `dispatch` compares them with eager before they serve.

Two images of 14 x 14 (or volumes of 14 x 14 x 14), in both memory formats, with the channels, dtypes, kernel, norm and
activation of the call. Compared are all results with those of fp64: each may be off by twice as much as eager's in the
same dtypes, plus some units in the last place of its largest element (the rule of the tests; proofs/README.md).
"""

import math
import threading

import torch
from torch import Tensor

from convnext_kernels import backends
from convnext_kernels.calls import BlockCall, DownsampleCall, Dwconv3dCall, DwconvCall, MlpCall, NormCall
from convnext_kernels.spec import MlpParameters, OpSpec

SIZE = 14
_FLOOR = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}  # units in the last place


def refusal(name: str, spec: OpSpec, device: torch.device) -> str | None:
    """Return why backend `name` must not serve `spec` on `device`: its error, or how wrong it is; None if it may.

    Runs in a thread of its own, so that modes, autocast and traces of the caller see nothing of it.
    """
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_try(name, spec, device)))
    thread.start()
    thread.join()
    return found[0]


def _try(name: str, spec: OpSpec, device: torch.device) -> str | None:
    try:
        for memory_format in (torch.channels_last, torch.contiguous_format):
            truth, eager, result = (
                _results(backend, spec, device, memory_format, wide)
                for backend, wide in (("eager", True), ("eager", False), (name, False))
            )
            for i in range(len(truth)):
                error, usual = ((t[i].double() - truth[i]).abs().max().item() for t in (result, eager))
                largest = truth[i].abs().max().item()
                # Under autocast the gradients of fp32 biases are sums of 16-bit values.
                floor = largest * max(_FLOOR[t] * torch.finfo(t).eps for t in (spec.dtype, spec.compute_dtype))
                if not error <= 2 * usual + floor:  # a NaN is wrong, too
                    return f"the check at first use failed: result {i} is off by {error:.2g}, eager by {usual:.2g}"
    except Exception as error:  # of compilers and drivers; the other backends serve
        return f"the check at first use failed: {type(error).__name__}: {' '.join(str(error).split()):.300}"
    return None


def _results(
    backend: str, spec: OpSpec, device: torch.device, memory_format: torch.memory_format, wide: bool
) -> list[Tensor]:
    """Compute the call on the same numbers in every dtype; in fp64 if `wide`."""
    generator = torch.Generator().manual_seed(0)
    dtype, compute = (torch.float64, torch.float64) if wide else (spec.dtype, spec.compute_dtype)
    c, d = spec.channels, spec.hidden
    kernel = spec.kernel_size
    variant = (spec.norm, spec.activation)
    # of MlpParameters
    of_parameters = [True, spec.norm == "layer", True, True, True, True, not spec.grn, spec.grn, spec.grn]

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device, spec.dtype).to(dtype)

    def image(channels: int, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
        return tensor(2, channels, *size).contiguous(memory_format=memory_format)

    def mlp_parameters() -> MlpParameters:
        norm = (1 + tensor(c, scale=0.1), tensor(c, scale=0.1) if spec.norm == "layer" else None)
        linear = (tensor(d, c, scale=c**-0.5), tensor(d, scale=0.1), tensor(c, d, scale=d**-0.5), tensor(c, scale=0.1))
        grn = (tensor(d), tensor(d)) if spec.grn else (None, None)
        return MlpParameters(*norm, *linear, None if spec.grn else tensor(c), *grn)

    norm_bias = tensor(c) if spec.norm == "layer" else None
    x = image(c, tuple(SIZE // k * k for k in kernel) if spec.op == "downsample" else (SIZE, SIZE))
    if spec.op == "dwconv":
        weight = tensor(c, 1, *kernel, scale=(kernel[0] * kernel[1]) ** -0.5)
        call, needs = DwconvCall(x, weight, tensor(c), spec.dilation, spec.stride, compute), [True] * 3
    elif spec.op == "dwconv3d":
        wide_format = torch.channels_last_3d if memory_format == torch.channels_last else memory_format
        x = tensor(2, c, SIZE, SIZE, SIZE).contiguous(memory_format=wide_format)
        weight = tensor(c, 1, *kernel, scale=math.prod(kernel) ** -0.5)
        call, needs = Dwconv3dCall(x, weight, tensor(c), spec.stride, compute), [True] * 3
    elif spec.op in ("layernorm", "grn"):
        call, needs = NormCall(x, tensor(c), norm_bias, 1e-6, spec.norm), [True, True, norm_bias is not None]
    elif spec.op == "mlp":
        call = MlpCall(x, image(c), mlp_parameters(), None, 1e-6, 1e-6, *variant, compute)
        needs = [True] * 2 + of_parameters
    elif spec.op == "block":
        weight = tensor(c, 1, *kernel, scale=(kernel[0] * kernel[1]) ** -0.5)
        call = BlockCall(x, weight, tensor(c), mlp_parameters(), None, spec.dilation, 1e-6, 1e-6, *variant, compute)
        needs = [True] * 3 + of_parameters
    else:
        weight = tensor(d, c, *kernel, scale=(c * kernel[0] * kernel[1]) ** -0.5)
        call = DownsampleCall(x, tensor(c), norm_bias, weight, tensor(d), 1e-6, spec.norm, compute)
        needs = [True, True, norm_bias is not None, True, True]
    module = backends.op_module(backend, spec.op)
    y = module.forward(call)
    if not spec.backward:
        return [y]
    dy = torch.empty_like(y).copy_(tensor(*y.shape))
    return [gradient for gradient in module.backward(dy, call, needs) if gradient is not None]
