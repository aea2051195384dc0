"""Exported models in ONNX Runtime, OpenVINO and AOTInductor; no operator that TensorRT does not have."""

import copy
from contextlib import nullcontext

import pytest
import torch

import convnext_kernels as ck
from tests.interop.helpers import MODELS, assert_as_good_as_a_peer, images, logits

pytestmark = [
    pytest.mark.extended,
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\..* (is|are) deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

NAMES = ("torchvision", "timm-v1", "timm-v2-conv", "transformers-v1", "transformers-v2", "transformers-dinov3")
# TensorRT 10.0 serves the opsets 9 to 20 and, of their operators, these and many more
# (https://github.com/onnx/onnx-tensorrt/blob/96e781103cfc4adf4a6bb557e94bac8e693f6f4c/docs/operators.md).
TENSORRT = """
    Add Cast Concat Constant Conv Div Flatten Gather Gelu Gemm GlobalAveragePool LayerNormalization MatMul Mul Range
    ReduceL2 ReduceMean Reshape Shape Slice Squeeze Transpose Unsqueeze
"""


def pair(name):
    plain = MODELS[name].make(dtype=torch.float32)
    return plain, ck.accelerate(copy.deepcopy(plain))


@pytest.fixture(scope="module", params=[(name, dynamo) for name in NAMES for dynamo in (True, False)], ids=str)
def exported(request, tmp_path_factory):
    """(the file, the model before `accelerate`) by PyTorch's two exporters, for every batch."""
    pytest.importorskip("onnx", reason="needs the package onnx")
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")
    name, dynamo = request.param
    plain, model = pair(name)
    file = str(tmp_path_factory.mktemp("onnx") / "model.onnx")
    batch = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
        if dynamo
        else {"dynamic_axes": {"x": {0: "batch"}}}
    )
    torch.onnx.export(model, (images(2, dtype=torch.float32),), file, dynamo=dynamo, input_names=["x"], **batch)
    return file, plain


def onnx_runtime(file):
    runtime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def openvino(file):
    openvino = pytest.importorskip("openvino", reason="needs the package openvino")
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled([x.numpy()]).values()


@pytest.mark.parametrize("engine", [onnx_runtime, openvino])
def test_logits(exported, engine):
    """For another batch too."""
    file, plain = exported
    run = engine(file)
    for n in (2, 3):
        x = images(n, dtype=torch.float32)
        with torch.no_grad():
            shape = logits(plain, x).shape  # of the logits, or the pooled features, among the outputs
        result = next(torch.from_numpy(y) for y in run(x) if y.shape == shape)
        assert_as_good_as_a_peer(result, plain, x)


def test_operators_of_tensorrt(exported):
    import onnx

    model = onnx.load(exported[0])
    assert [(o.domain, o.version <= 20) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", True)]
    constants = {i.name for i in model.graph.initializer} | {
        n.output[0] for n in model.graph.node if n.op_type == "Constant"
    }
    for node in model.graph.node:
        assert node.domain == ""
        assert node.op_type in TENSORRT.split()
        if node.op_type == "LayerNormalization":
            assert len(node.output) == 1, "TensorRT has the first result only"
        if node.op_type in ("ReduceL2", "ReduceMean", "Squeeze", "Unsqueeze"):
            assert set(node.input[1:]) <= constants, "TensorRT wants constant axes"


@pytest.mark.parametrize("kept", [False, True], ids=["operators", "ops"])
@pytest.mark.parametrize("name", ["timm-v1", "timm-v2-conv"])
def test_aotinductor(name, kept, tmp_path):
    """Compiled, loaded and run for another batch."""
    plain, model = pair(name)
    with torch.no_grad():
        with ck.keep_ops() if kept else nullcontext():
            batch = {0: torch.export.Dim("batch", min=2)}
            program = torch.export.export(model, (images(dtype=torch.float32),), strict=False, dynamic_shapes=(batch,))
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = images(3, dtype=torch.float32)
        result = torch._inductor.aoti_load_package(file)(x)
        assert_as_good_as_a_peer(result, plain, x)
        if kept:
            torch.testing.assert_close(result, model(x))
