"""The calls of csrc/cpu/mlp.cpp and mlp_backward.cpp, which serve `mlp` and `block`, and the packing of parameters."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convnext_kernels import calls
from convnext_kernels.backends.cpu import native
from convnext_kernels.backends.cpu.dwconv import bias_or_zeros, taps_first
from convnext_kernels.backends.cpu.layout import address, dense_nhwc, finish, flat_float, output_for
from convnext_kernels.backends.cpu.packed import Known, Launch, packed
from convnext_kernels.calls import BlockCall, BlocksCall, MlpCall
from convnext_kernels.spec import MlpParameters
from convnext_kernels.tuning import Candidate, cache, forcing, pick
from convnext_kernels.variants import constant

# Schedules of csrc/cpu/ops.h with their numbers; the first one is the default.
SCHEDULES = tuple(
    Candidate(name, {"schedule": i - 1})
    for i, name in enumerate(("by-shape", "short", "long", "half-tiles", "double-tiles", "columns"))
)
PHASES = ("dwconv", "LayerNorm", "W1, GELU", "GRN", "W2, residual", "waiting")  # in the order of csrc/cpu/ops.h

_phases: ContextVar[Tensor | None] = ContextVar("convnext_kernels_cpu_phases", default=None)
calls.SETTINGS.append(_phases.get)


@contextmanager
def timed_phases() -> Iterator[Tensor]:
    """Measure in which phases the calls inside the ``with`` block (of the current thread) spend their time.

    Yields (threads, len(PHASES)) float64: the seconds of each thread of the team in each phase, summed over the calls.
    The clock is read at every change of phase, which costs some 30 ns each time.
    """
    seconds = torch.zeros(torch.get_num_threads(), len(PHASES), dtype=torch.float64)
    token = _phases.set(seconds)
    try:
        yield seconds
    finally:
        _phases.reset(token)


def _matrices(p: MlpParameters) -> tuple[Tensor, Tensor]:
    """Both pointwise weights, dense, in one dtype that the kernels can read: their own if possible, else fp32."""
    w1, w2 = (t.detach().contiguous().flatten() for t in (p.pwconv1_weight, p.pwconv2_weight))
    if w1.dtype == w2.dtype and w1.dtype in native.DTYPE_CODES:
        return w1, w2
    return w1.float(), w2.float()


def _schedule(call: MlpCall | BlockCall, kernel: tuple[int, int], keeps: int) -> int:
    """The schedule that was timed to be the fastest, else -1: by shape."""
    force, generation = forcing(), cache.generation()
    if not generation and not force:
        return -1
    memo = {} if call.inputs is None or force else call.inputs.signature.memo
    state = ("schedule", native.isa(), torch.get_num_threads(), generation)
    found = memo.get(state)
    if found is None:
        x, p = call.x, call.p
        wide, grn = p.pwconv1_weight.shape[0], p.grn_weight is not None
        problem = (*x.shape, x.dtype, call.compute_dtype, *kernel, wide, grn, keeps)
        found = memo[state] = pick("mlp_schedule", problem, SCHEDULES, native.machine()).config["schedule"]
    return found


class _Facts(NamedTuple):
    """What follows from a call's signature."""

    problem: Callable[[int], Any]  # the extension's MlpProblem with a schedule
    direct: bool  # whether x and the result are dense NHWC
    operations: int
    configuration: tuple  # of the packed parameters: dtype, kernel, dilation, eps, grn_eps, norm, activation
    adaptive: bool  # whether each sample has a weight and a bias of LayerNorm


def _facts(call: MlpCall | BlockCall, dilation: tuple[int, int], kernel: tuple[int, int]) -> _Facts:
    memo = {} if call.inputs is None else call.inputs.signature.memo
    found = memo.get("cpu mlp")
    if found is None:
        x = call.x
        n, c, h, w = x.shape
        direct = x.is_contiguous(memory_format=torch.channels_last)
        direct = direct and torch.empty_like(x, device="meta").is_contiguous(memory_format=torch.channels_last)
        operations = n * h * w * c * (2 * call.p.pwconv1_weight.shape[0] + kernel[0] * kernel[1])
        codes = native.DTYPE_CODES[x.dtype], native.DTYPE_CODES[call.compute_dtype]
        problem = functools.cache(functools.partial(native.extension().MlpProblem, codes[0], n, h, w, codes[1]))
        options = call.eps, call.grn_eps, call.norm, call.activation
        configuration = (call.compute_dtype == torch.bfloat16, kernel, dilation, *options)
        found = memo["cpu mlp"] = _Facts(problem, direct, operations, configuration, call.p.adaptive)
    return found


def _pack(p: MlpParameters, dw_weight: Tensor | None, dw_bias: Tensor | None, isa: str, configuration: tuple) -> object:
    hidden, channels = p.pwconv1_weight.shape[:2]
    w1, w2 = _matrices(p)
    b2 = bias_or_zeros(p.pwconv2_bias, channels)
    if p.grn_bias is not None:
        b2 = torch.addmv(b2, w2.view(channels, hidden).float(), flat_float(p.grn_bias))
    # Every tensor whose address is passed has a name here: it must outlive the call.
    taps = None if dw_weight is None else taps_first(dw_weight)
    taps_bias = None if dw_weight is None else bias_or_zeros(dw_bias, channels)
    norm_weight, norm_bias = flat_float(p.norm_weight), bias_or_zeros(p.norm_bias, channels)
    b1, grn_weight = bias_or_zeros(p.pwconv1_bias, hidden), flat_float(p.grn_weight)
    gamma = torch.ones(channels) if p.gamma is None else flat_float(p.gamma)
    bf16, kernel, dilation, eps, grn_eps, norm, activation = configuration
    return native.extension().PackedMlp(
        native.isa_code(isa),
        bf16,
        native.DTYPE_CODES[w1.dtype],
        channels,
        hidden,
        *kernel,
        *dilation,
        eps,
        grn_eps,
        native.norm_code(norm),
        native.activation_code(activation),
        address(taps),
        address(taps_bias),
        address(norm_weight),
        address(norm_bias),
        address(w1),
        address(b1),
        address(grn_weight),
        address(w2),
        address(b2),
        address(gamma),
        torch.get_num_threads(),
    )


def _kernel(
    p: MlpParameters,
    dw_weight: Tensor | None,
    dw_bias: Tensor | None,
    configuration: tuple,
    known: Known | None = None,
    launch: Launch | None = None,
) -> Any:
    """The extension's object with the packed parameters."""
    isa = native.isa()

    def pack() -> object:
        return _pack(p, dw_weight, dw_bias, isa, configuration)

    # The variant is the norm's weight: an AdaLayerNorm has one for each condition.
    variant = p.norm_weight.data_ptr()
    return packed(p.pwconv1_weight, (dw_weight, dw_bias, *p), (isa, configuration), pack, known, variant, launch)


def _team(operations: int) -> tuple[int, Tensor | None]:
    """The number of threads, and where they add the seconds of their phases."""
    threads, phases = native.threads(operations), _phases.get()
    if phases is not None:
        threads = min(threads, len(phases))  # a row each: PyTorch's number of threads may have grown since
    return threads, phases


def run(
    call: MlpCall | BlockCall,
    residual: Tensor | None,
    dwconv: tuple[Tensor, Tensor | None, tuple[int, int]] | None,  # weight, bias, dilation
    kept_y: Tensor | None = None,
    kept_hidden: Tensor | None = None,
    repeatable: bool = False,
) -> Tensor:
    """Run the block (with `dwconv`) or the inverted bottleneck alone (without).

    `kept_y` (like x) and `kept_hidden` (N, hidden, H, W), both channels_last, are filled for the gradient if given.
    `repeatable`: this is all that the op does, so the extension may serve a call that repeats this one.
    """
    x, p, inputs = call.x, call.p, call.inputs
    dw_weight, dw_bias, dilation = dwconv or (None, None, (1, 1))
    kernel_size = (0, 0) if dw_weight is None else tuple(dw_weight.shape[2:])
    facts, drop, known = _facts(call, dilation, kernel_size), call.drop_scale, None
    if inputs is not None:
        parameters = slice(1 if dwconv or residual is None else 2, None if drop is None else -1)
        known = Known(inputs.signature, inputs.tensors[parameters], inputs.addresses[parameters])
    norm_weight = norm_bias = None
    if facts.adaptive:  # arguments of the call: the packed parameters serve every condition
        norm_weight, norm_bias = flat_float(p.norm_weight), flat_float(p.norm_bias)
        p = p._replace(norm_weight=constant(x, 1.0), norm_bias=constant(x, 0.0))
        known = None
    schedule = _schedule(call, kernel_size, (kept_y is not None) + (kept_hidden is not None))
    written = out = torch.empty_like(x) if facts.direct else None
    launch = None
    if repeatable and facts.direct and not facts.adaptive and drop is kept_y is kept_hidden is None:
        launch = _launch(call, facts, schedule, lambda kernel: [kernel], out)
    kernel = _kernel(p, dw_weight, dw_bias, facts.configuration, known, launch)
    if facts.direct:
        x_nhwc = x
    else:
        x_nhwc = dense_nhwc(x)
        written, out = output_for(x)
    # The block's residual is x itself; one conversion serves both.
    residual_nhwc = x_nhwc if residual is x else None if residual is None else dense_nhwc(residual)
    drop = None if drop is None else flat_float(drop)
    threads, phases = _team(facts.operations)
    kernel.forward(
        facts.problem(schedule),
        x_nhwc.data_ptr(),
        address(residual_nhwc),
        written.data_ptr(),
        threads,
        address(phases),
        address(drop),
        address(kept_y),
        address(kept_hidden),
        address(norm_weight),
        address(norm_bias),
    )
    return out if facts.direct else finish(written, out)


def _launch(
    call: BlockCall | BlocksCall, facts: _Facts, schedule: int, blocks: Callable[[Any], list], out: Tensor
) -> Launch | None:
    """For calls that repeat this one; None if it must not be repeated. ``blocks(packed)``: the extension's objects."""
    repeated = None if call.inputs is None else call.inputs.repeated
    if repeated is None or forcing() or _phases.get() is not None:
        return None
    threads, problem = native.threads(facts.operations), facts.problem(schedule)
    several = isinstance(call, BlocksCall) and len(call.blocks) > 1

    def bind(packed: Any) -> Any:
        return native.extension().launch_blocks(blocks(packed), problem, threads)

    return Launch(repeated, bind, out, several)


def run_blocks(call: BlocksCall) -> Tensor:
    """Run consecutive blocks of one shape: one check of all parameters, and one call of the extension."""
    x, blocks, _, inputs = call
    bf16 = call.compute_dtype == torch.bfloat16

    def pack() -> list:
        return [_kernel(b.p, b.weight, b.bias, (bf16, tuple(b.weight.shape[2:]), *b[3:])) for b in blocks]

    configuration = (native.isa(), "blocks", bf16, tuple(b[3:] for b in blocks))
    first = blocks[0]
    known = Known(inputs.signature, inputs.tensors[1:], inputs.addresses[1:])
    of_first, kernel_size = call.block(0, x)._replace(inputs=inputs), tuple(first.weight.shape[2:])
    facts = _facts(of_first, first.dilation, kernel_size)
    schedule = _schedule(of_first, kernel_size, 0)
    x_nhwc = dense_nhwc(x)
    written, between = torch.empty_like(x_nhwc), torch.empty_like(x_nhwc) if len(blocks) > 1 else None
    launch = _launch(call, facts, schedule, lambda kernels: kernels, written) if facts.direct else None
    kernels = packed(first.p.pwconv1_weight, known.tensors, configuration, pack, known, launch=launch)
    threads, phases = _team(facts.operations)
    addresses = x_nhwc.data_ptr(), written.data_ptr(), address(between)
    native.extension().forward_blocks(kernels, facts.problem(schedule), *addresses, threads, address(phases))
    return written if facts.direct else finish(written, torch.empty_like(x))


def backward(
    dout: Tensor,
    x: Tensor,
    p: MlpParameters,
    drop_scale: Tensor | None,
    eps: float,
    grn_eps: float,
    norm: str,
    activation: str,
    compute_dtype: torch.dtype,
    needs_norm: bool,
    needs_weights: bool,
    hidden: Tensor | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return (dx like x, or None; gradients of the parameters by name, fp32 but for the two weights' in their dtype).

    `needs_norm` requests the gradients of x and of LayerNorm's parameters, `needs_weights` those of the two Linears'
    weights and biases and of gamma; those of GRN are always computed. `hidden` is what `run` kept; without it the first
    matmul is computed again.
    """
    n, channels, h, w = x.shape
    width = p.pwconv1_weight.shape[0]
    isa, bf16 = native.isa(), compute_dtype == torch.bfloat16
    w1, w2 = _matrices(p)

    def pack() -> object:
        # Every tensor whose address is passed has a name here: it must outlive the call.
        norm_weight, norm_bias = flat_float(p.norm_weight), bias_or_zeros(p.norm_bias, channels)
        b1, b2 = bias_or_zeros(p.pwconv1_bias, width), bias_or_zeros(p.pwconv2_bias, channels)
        grn_weight, grn_bias = flat_float(p.grn_weight), flat_float(p.grn_bias)
        gamma = torch.ones(channels) if p.gamma is None else flat_float(p.gamma)
        return native.extension().PackedMlpBackward(
            native.isa_code(isa),
            bf16,
            native.DTYPE_CODES[w1.dtype],
            hidden is None,
            channels,
            width,
            eps,
            grn_eps,
            native.norm_code(norm),
            native.activation_code(activation),
            address(norm_weight),
            address(norm_bias),
            address(w1),
            address(b1),
            address(grn_weight),
            address(grn_bias),
            address(w2),
            address(b2),
            address(gamma),
            torch.get_num_threads(),
        )

    configuration = (isa, "bottleneck backward", bf16, hidden is None, eps, grn_eps, norm, activation)
    kernel = packed(p.pwconv1_weight, p, configuration, pack)
    shapes: dict[str, tuple[int, ...]] = {}
    if needs_weights:
        shapes |= {"pwconv1_weight": (width, channels), "pwconv1_bias": (width,)}
        shapes |= {"pwconv2_weight": (channels, width), "pwconv2_bias": (channels,), "gamma": (channels,)}
    if needs_norm:
        shapes |= {"norm_weight": (channels,), "norm_bias": (channels,)}
    if p.grn_weight is not None:
        shapes |= {"grn_weight": (width,), "grn_bias": (width,)}
    dtypes = {1: torch.float32, 2: w1.dtype}
    gradients = {name: torch.empty(shape, dtype=dtypes[len(shape)]) for name, shape in shapes.items()}

    def addresses(*names: str) -> list[int]:
        return [address(gradients.get(name)) for name in names]

    x_nhwc, dout_nhwc = dense_nhwc(x), dense_nhwc(dout)
    written, dx = output_for(x) if needs_norm else (None, None)
    drop = None if drop_scale is None else flat_float(drop_scale)
    kernel.backward(
        native.DTYPE_CODES[x.dtype],
        address(x_nhwc),
        address(dout_nhwc),
        address(hidden),
        native.DTYPE_CODES[compute_dtype],
        n,
        h * w,
        address(drop),
        address(w2),
        address(written),
        addresses("pwconv1_weight", "pwconv1_bias", "pwconv2_weight", "pwconv2_bias", "gamma"),
        addresses("norm_weight", "norm_bias"),
        addresses("grn_weight", "grn_bias"),
        native.threads(5 * n * h * w * channels * width),
    )
    return (finish(written, dx) if needs_norm else None), gradients
