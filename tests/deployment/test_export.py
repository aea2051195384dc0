"""Exported programs consist of PyTorch's operators and give the model's logits; `keep_ops` keeps this package's ops."""

import copy

import pytest
import torch
from torch import nn

import convnext_kernels as ck
from convnext_kernels.models import ConvNeXt
from convnext_kernels.nn import DepthwiseConv1d, DepthwiseConv3d, PatchDownsample2d
from tests.interop.helpers import MODELS, images, logits
from tests.operators import OPERATORS
from tests.shapes import Case, chosen
from tests.tolerance import assert_as_good_as_eager, randomize_

# PyTorch deprecates TorchScript as a whole.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\..* (is|are) deprecated")
NEW = tuple(map(int, torch.__version__.split(".")[:2]))
# modules of this package, from the rate of drop path
OWN = {
    "sequence": lambda drop: ck.FusedConvNeXtBlock1d(8, drop, use_grn=True),
    "dwconv, sequence": lambda drop: DepthwiseConv1d(8, 3),
    "dwconv, volume": lambda drop: DepthwiseConv3d(8, 5, stride=2),
    "dwconv": lambda drop: ck.DepthwiseConv2d(8, (3, 7), dilation=(2, 1)),
    "dwconv, stride 2": lambda drop: ck.DepthwiseConv2d(8, 5, stride=2),
    "layernorm": lambda drop: ck.LayerNorm2d(8),
    "grn": lambda drop: ck.GlobalResponseNorm(8),
    "downsample": lambda drop: PatchDownsample2d(8, 16, 3),
    "block V1": lambda drop: ck.FusedConvNeXtBlock(8, drop),
    "block V2": lambda drop: ck.FusedConvNeXtBlock(8, drop, use_grn=True),
    "block with RMSNorm": lambda drop: ck.FusedConvNeXtBlock(8, drop, norm="rms", activation="hardswish"),
    "network": lambda drop: ConvNeXt((1, 1), (8, 16), num_classes=5, use_grn=True, drop_path_rate=drop),
}


def own(kind, drop=0.0, batch=4):
    """A module of this package and an input."""
    sizes = (50, 46, 34)[: 1 if "sequence" in kind else 3 if "volume" in kind else 2]
    return randomize_(OWN[kind](drop)).eval(), torch.randn(batch, 3 if kind == "network" else 8, *sizes)


def export(module, inputs, strict=False, **options):
    """`torch.export.export`; before PyTorch 2.7 `strict` was True by default."""
    return torch.export.export(module, inputs, strict=strict, **options)


def operators(program):
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)}


def assert_only_pytorchs(program):
    foreign = {name for name in operators(program) if not name.startswith("aten.")}
    assert operators(program)
    assert not foreign


def assert_right(module, plain, x):
    """`module` computes on x what `plain` does, by the rule of the tests."""
    with torch.no_grad():
        truth = logits(copy.deepcopy(plain).double(), x.double())
        with ck.use_backend("eager"):
            eager = logits(plain, x)
        assert_as_good_as_eager(logits(module, x), eager, truth)


@chosen(lambda name: name == "transformers-dinov3")
@pytest.mark.parametrize("name", MODELS)
def test_accelerated_model(name):
    plain = MODELS[name].make(dtype=torch.float32)
    m = ck.accelerate(copy.deepcopy(plain))
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = export(m, (images(dtype=torch.float32),), dynamic_shapes=(batch,))
    assert_only_pytorchs(program)
    assert_right(program.module(), plain, images(3, dtype=torch.float32))


@chosen(lambda kind, strict: not strict or kind == "block V2")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("kind", OWN)
def test_own_module(kind, strict):
    if strict and NEW < (2, 7):
        pytest.skip("PyTorch 2.6 does not tell its strict export from torch.compile")
    if kind == "network" and NEW == (2, 8):
        pytest.skip("PyTorch 2.8 cannot prove the sizes of a network's maps; 2.6, 2.11 and 2.14 can")
    module, x = own(kind)
    dims = {0: torch.export.Dim("batch", min=2, max=64)}
    dims |= {i: torch.export.Dim(f"size{i}", min=16) for i in range(2, x.dim())}
    program = export(module, (x,), dynamic_shapes=(dims,), strict=strict)
    assert_only_pytorchs(program)
    assert_right(program.module(), module, x[:3, :, 15:][..., 13:])


@pytest.mark.parametrize("op", OPERATORS)
def test_function(op):
    """With every optional argument, and with none."""
    operator = OPERATORS[op]

    class Function(nn.Module):
        def __init__(self, arguments):
            super().__init__()
            self.names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "x"]
            self.options = {k: v for k, v in arguments.items() if k not in (*self.names, "x")}
            for name in self.names:
                self.register_buffer(name, arguments[name])

        def forward(self, x):
            return operator.call(x=x, **{name: getattr(self, name) for name in self.names}, **self.options)

    small = {"n": 2, "c": 6, "h": 5, "w": 4, "k": 3, "ratio": 2}
    for case in (Case("all", **small, drop=True, variant="v2"), Case("none", **small, bias=False, variant="v1")):
        arguments = operator.arguments(case, torch.float32)
        module, x = Function(arguments), arguments["x"]
        program = export(module, (x,))
        assert_only_pytorchs(program)
        truth = operator.reference(**arguments)
        actual, traced = program.module()(x), torch.jit.trace(module, x, check_trace=False)(x)
        for y in (actual, traced):
            assert_as_good_as_eager(y, operator.call(**arguments, backend="eager"), truth)


def test_16_bits_do_not_overflow():
    """GRN's norm is in fp32."""
    module = randomize_(ck.GlobalResponseNorm(4)).half()
    x = torch.full((1, 4, 32, 32), 3000.0).half()  # of norm 96000
    assert export(module, (x,)).module()(x).isfinite().all()


def test_training_mode():
    """Drop path is part of the program, and its operators are differentiable."""
    block, x = own("block V1", drop=0.5, batch=64)
    program = export(block.train(), (x,))
    assert_only_pytorchs(program)
    module = program.module()
    y = module(x.requires_grad_())
    assert 8 < (y == x).flatten(1).all(1).sum() < 56
    y.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_keep_ops():
    x = images(dtype=torch.float32)
    accelerated = ck.accelerate(MODELS["timm-v1"].make(dtype=torch.float32))
    network = own("network")[0]
    for m, blocks in ((accelerated, 4), (network, 2)):
        with ck.keep_ops(), torch.no_grad():
            program = export(m, (x,))
        names = [str(n.target) for n in program.graph.nodes]
        assert names.count("convnext_kernels.block.default") == blocks
        with torch.no_grad():
            assert torch.equal(program.module()(x), m(x))
        assert_only_pytorchs(export(m, (x,)))


def test_keep_ops_ends_with_its_block():
    block, x = own("block V1")
    with ck.keep_ops():
        with ck.keep_ops():
            pass
        assert "convnext_kernels.block.default" in operators(export(block, (x,)))
        with pytest.raises(ValueError, match="x: "), ck.keep_ops():
            export(block, (x[0],))
    assert_only_pytorchs(export(block, (x,)))


@chosen(lambda name: name == "torchvision")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:transformers.*")  # which checks the images
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_trace_of_an_accelerated_model(name):
    plain = MODELS[name].make(dtype=torch.float32)
    m = ck.accelerate(copy.deepcopy(plain))
    traced = torch.jit.trace(m, images(dtype=torch.float32), strict=False)
    assert "convnext_kernels::" not in str(traced.inlined_graph)

    def module(x):
        y = traced(x)
        return y if isinstance(y, torch.Tensor) else y.get("logits", y.get("pooler_output"))

    assert_right(lambda x: module(x), plain, images(3, size=96, dtype=torch.float32))


def test_trace_cannot_keep_the_ops():
    accelerated = ck.accelerate(MODELS["timm-v1"].make(dtype=torch.float32))
    for module, x in (own("block V1"), (accelerated, images(dtype=torch.float32))):
        with ck.keep_ops(), pytest.raises(RuntimeError, match=r"keep_ops: torch\.jit\.trace cannot keep the ops"):
            torch.jit.trace(module, x)


@pytest.mark.parametrize("kind", [*OWN, "accelerated"])
def test_script_says_what_to_do(kind):
    module, x = (ck.accelerate(MODELS["torchvision"].make()), images()) if kind == "accelerated" else own(kind)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile \w+: use torch\.export"):
        torch.jit.script(module)
    module(x)
