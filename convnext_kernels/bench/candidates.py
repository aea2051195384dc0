"""The candidates: this package, eager PyTorch in two layouts, torch.compile, OpenVINO and ONNX Runtime.

Every candidate gets the same inputs and weights, the same number of threads and the best settings known to us: NHWC
input and output if possible, its own low precision, weights frozen for inference. One-time work (compiling, packing,
converting the input's layout) happens in `build` and is not timed.
"""

import copy
import importlib.util
import io
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convnext_kernels import graphs
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, STEP, WEIGHT_GRADIENT, Case
from convnext_kernels.bench.results import EAGER, OURS, Unavailable
from convnext_kernels.bench.workloads import Step, Workload
from convnext_kernels.torch_versions import tf32_allowed

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Call = Callable[[], Tensor]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 for matmuls and convolutions of fp32 tensors on a GPU inside the context, or use IEEE fp32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = tf32_allowed(), convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@dataclass(frozen=True, kw_only=True)
class Prepared(Workload):
    """The workload of a case in its dtype, on its device and in channels_last memory."""

    case: Case
    device: str

    def parts(self, which: str, contiguous: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A copy of the module `which`, "eager" or "ours", and its inputs; `contiguous`: in NCHW memory."""
        module = copy.deepcopy(getattr(self, which))
        if contiguous:
            return module.to(memory_format=torch.contiguous_format), tuple(x.contiguous() for x in self.inputs)
        return module, self.inputs

    def call(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
        """The function that is timed."""
        return self.step(module, inputs) if self.case.trains else lambda: module(*inputs)


@dataclass(frozen=True)
class Candidate:
    """`build` returns the function that is timed; it raises `Unavailable` if it cannot run this case."""

    name: str
    build: Callable[[Prepared], Call]
    wanted: Callable[[Case, str], bool] = lambda _case, _mode: True  # whether it takes part


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and output of the peers, which would hide our own."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


def _plain(which: str, contiguous: bool = False) -> Callable[[Prepared], Call]:
    return lambda prepared: prepared.call(*prepared.parts(which, contiguous))


def compiled(which: str = "eager", autotune: bool = False, cudagraphs: bool = False) -> Callable[[Prepared], Call]:
    """``torch.compile`` of the module `which`: "eager" or "ours"; `cudagraphs` as in mode="reduce-overhead"."""

    def build(prepared: Prepared) -> Call:
        if prepared.device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise Unavailable("torch.compile on a CPU needs a C++ compiler, and none is on PATH")
        from torch._inductor import config

        training = prepared.case.trains
        options = {"triton.cudagraphs": True} if cudagraphs else {}
        if autotune:
            # On a GPU with CUDA graphs, as in mode="max-autotune", unless a backward pass needs the outputs.
            options = {"max_autotune": True, "triton.cudagraphs": prepared.device == "cuda" and not training}
        module, inputs = prepared.parts(which)
        weights = copy.deepcopy(module.state_dict())
        call = prepared.call(torch.compile(module, dynamic=False, options=options), inputs)
        # Freezing makes the weights constants and packs them for oneDNN, at the first call and without gradients.
        gradients = nullcontext() if training else torch.inference_mode()
        with quiet(), gradients, config.patch(freezing=not training):
            call()
        if training:
            module.load_state_dict(weights)  # a step with an optimiser has changed them
        return call

    return build


def _with_memory(memory: str) -> Callable[[Prepared], Call]:
    """A training step of our block with one setting of `memory`."""

    def build(prepared: Prepared) -> Call:
        module, inputs = prepared.parts("ours")
        module.model.memory = memory
        return prepared.call(module, inputs)

    return build


def _graphed(prepared: Prepared) -> Call:
    """Our module as CUDA graphs."""
    module, inputs = prepared.parts("ours")
    if prepared.case.trains:
        samples = tuple(x.detach().clone().requires_grad_() for x in inputs)
        return Step(torch.cuda.make_graphed_callables(module, samples), inputs)
    graph = graphs.graphed(module.requires_grad_(False), inputs)
    return lambda: graph(*inputs)


def _need_engine(prepared: Prepared, modules: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    if absent := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise Unavailable(f'{" and ".join(absent)} not installed: pip install "convnext-kernels[bench]"')
    if prepared.device != "cpu":
        raise Unavailable("benchmarked on CPUs only")
    if prepared.case.dtype not in dtypes:
        raise Unavailable(f"has no {prepared.case.dtype} kernels for CPUs")


def _channels_to_the_end(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), (N, C, D, H, W) as (N, D, H, W, C); logits as they are."""
    return x.movedim(1, -1) if x.ndim > 2 else x


class _Nhwc(nn.Module):
    """The module with (N, H, W, C) input and, for images, output: the same layout for engines without strides."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return _channels_to_the_end(self.module(*(x.movedim(-1, 1) for x in inputs)))


def _nhwc(prepared: Prepared) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An fp32 copy of the module with (N, H, W, C) interfaces, and inputs for it."""
    module, inputs = prepared.parts("eager", contiguous=True)
    return _Nhwc(module.float()).eval(), tuple(_channels_to_the_end(x).float() for x in inputs)


def _nchw(y: Tensor) -> Tensor:
    """The (N, H, W, C) result of an engine as a view (N, C, H, W), like those of the other candidates."""
    return y.movedim(-1, 1) if y.ndim > 2 else y


def _openvino(prepared: Prepared) -> Call:
    _need_engine(prepared, ("openvino", "numpy"), ("fp32", "bf16"))
    # Disable its telemetry, which would fork this process, by now several gigabytes large, several times per model to
    # send reports: OpenVINO uses a stub if this package cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino as ov

    dtype, low = DTYPES[prepared.case.dtype], prepared.case.dtype == "bf16"
    element, bits, name = (ov.Type.bf16, torch.uint16, "uint16") if low else (ov.Type.f32, torch.float32, "float32")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
    }
    module, inputs = _nhwc(prepared)
    with quiet(), torch.no_grad():
        model = ov.convert_model(module, example_input=inputs, input=[tuple(x.shape) for x in inputs])
        # bf16 input and output too: with fp32 ones it would move twice the bytes of the other candidates.
        border = ov.preprocess.PrePostProcessor(model)
        for index in range(len(inputs)):
            border.input(index).tensor().set_element_type(element)
        border.output().tensor().set_element_type(element)
        request = ov.Core().compile_model(border.build(), "CPU", settings).create_infer_request()
    held = [_channels_to_the_end(x).contiguous() for x in prepared.inputs]  # the request reads their memory
    for index, x in enumerate(held):
        request.set_input_tensor(index, ov.Tensor(x.view(bits).numpy(), x.shape, element))
    output = request.get_output_tensor(0)

    def call() -> Tensor:
        request.infer()
        return _nchw(torch.from_numpy(output.data.view(name)).view(dtype))

    call.held = held
    return call


def _onnxruntime(prepared: Prepared) -> Call:
    _need_engine(prepared, ("onnxruntime", "onnx", "onnxscript"), ("fp32",))
    import onnxruntime as ort

    module, inputs = _nhwc(prepared)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    names = [f"x{index}" for index in range(len(inputs))]
    with quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(module, inputs, str(file), input_names=names, output_names=["y"], dynamo=True)
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        y = torch.empty_like(module(*inputs)).contiguous()
    binding, held = session.io_binding(), [x.contiguous().numpy() for x in inputs]  # the binding reads their memory
    for name, array in zip(names, held, strict=True):
        binding.bind_cpu_input(name, array)
    binding.bind_output("y", "cpu", 0, "float32", tuple(y.shape), y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return _nchw(y)

    call.held = held
    return call


# In full mode every candidate takes part in every case. Compiling takes seconds for an op and minutes for a model: the
# other modes compile only in the cases that matter most, and so end in 15 and in 2 minutes.


def _compile_wanted(case: Case, mode: str) -> bool:
    if mode == QUICK:
        return case.group == "layernorm" and case.direction == "forward"
    if case.direction in (STEP, WEIGHT_GRADIENT):
        return case.group != "dwconv3d"
    if mode == STANDARD and case.group == "block":
        return case.direction == "forward" or case.channels in (96, 384)
    return mode == FULL or (case.group == "model" and case.what == "ConvNeXt-T 224" and case.batch == 1)


def _autotune_wanted(case: Case, mode: str) -> bool:
    if case.direction == STEP:
        return case.group == "block" and mode != QUICK
    important = case.group == "block" and case.channels == 384 and case.direction == "forward"
    return (mode == FULL and case.direction != WEIGHT_GRADIENT) or (mode == STANDARD and important)


def _memory_wanted(case: Case, _mode: str) -> bool:
    return (case.group, case.direction) == ("block", STEP)


def _engine_wanted(case: Case, mode: str) -> bool:
    return case.direction == "forward" and (mode != QUICK or case.group == "block")


CANDIDATES = (
    Candidate(EAGER, _plain("eager")),
    Candidate(OURS, _plain("ours"), lambda case, _mode: case.group != "rival"),
    Candidate("eager, contiguous", _plain("eager", contiguous=True)),
    Candidate("torch.compile", compiled(), _compile_wanted),
    Candidate("torch.compile, max-autotune", compiled(autotune=True), _autotune_wanted),
    Candidate(f"{OURS}, min", _with_memory("min"), _memory_wanted),
    Candidate(f"{OURS}, balanced", _with_memory("balanced"), _memory_wanted),
    Candidate("OpenVINO", _openvino, _engine_wanted),
    Candidate("ONNX Runtime", _onnxruntime, _engine_wanted),
)

NEEDS_GPU = GRAPH, OVERHEAD = "CUDA graph", "reduce-overhead"
# What `verify` compares for whole models, the most telling first: should time run out, the last ones are missing. On a
# CPU it leaves out those of NEEDS_GPU.
MODEL_CANDIDATES = (
    *CANDIDATES[:2],
    Candidate(f"{OURS}, {GRAPH}", _graphed),
    Candidate("torch.compile", compiled()),
    Candidate(f"torch.compile, {OVERHEAD}", compiled(cudagraphs=True)),
    Candidate(f"{OURS}, torch.compile", compiled("ours")),
    CANDIDATES[2],
)
