"""Depthwise convolution of volumes: values, gradients and layouts on every backend, and what the op promises.

It has a table of its own: the cases of tests/shapes.py are images.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import convnext_kernels.ops.flops  # noqa: F401  registers the formulas
from convnext_kernels import BackendError, exporting, functional
from convnext_kernels.nn import DepthwiseConv3d
from tests.operators import gradients
from tests.shapes import CUDA, DTYPES, TRITON, chosen
from tests.tolerance import assert_as_good_as_eager, generator, random_vector, random_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Volume:
    """One shape of the op."""

    reason: str
    n: int = 2
    c: int = 17
    d: int = 5
    h: int = 4
    w: int = 6
    k: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1
    bias: bool = True
    costly: bool = False  # in Triton's interpreter

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.k))
        return f"n{self.n}-c{self.c}-{self.d}x{self.h}x{self.w}-k{kernel}-s{self.stride}" + (
            "" if self.bias else "-nobias"
        )


VOLUMES = (
    Volume("one channel more than a vector, batch 2"),
    Volume("one channel, no bias", c=1, bias=False),
    Volume("D, H and W smaller than K", n=1, c=3, d=2, h=1, w=3, k=(7, 7, 7)),
    Volume("one voxel", n=1, d=1, h=1, w=1, k=(5, 5, 5)),
    Volume("K 5, wider than a register tile", n=1, c=33, d=4, h=5, w=15, k=(5, 5, 5), costly=True),
    Volume("K 7, whole vectors", n=1, c=32, d=8, h=7, w=9, k=(7, 7, 7), costly=True),
    Volume("three different sides", k=(3, 5, 7), w=8),
    Volume("a column of depth, which is along no row", k=(5, 1, 1)),
    Volume("kernels of one column", k=(3, 7, 1), h=9, w=3),
    Volume("one kernel plane: images after one another", k=(1, 3, 3)),
    Volume("stride 2, odd sizes: the last plane is a centre", stride=2, h=7, w=5),
    Volume("stride 2, even sizes, K 5", stride=2, c=16, d=4, h=6, w=8, k=(5, 5, 5), costly=True),
    Volume("more planes than the weight gradient takes at once", n=1, c=8, d=14, h=2, w=3, costly=True),
    Volume(
        "too wide for the CPU to hold all planes of its weight gradient",
        n=1,
        c=3,
        d=2,
        h=5,
        w=300,
        k=(7, 3, 5),
        costly=True,
    ),
    Volume("more rows than a band of the CPU's forward pass", n=1, c=64, d=2, h=40, w=17, costly=True),
)
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1) -> Tensor:
    return F.conv3d(x, weight, bias, stride, [side // 2 for side in weight.shape[2:]], groups=len(weight))


def arguments(case: Volume, dtype: torch.dtype) -> dict[str, Tensor | int | None]:
    g = generator("dwconv3d", str(case))
    x = torch.randn(case.n, case.c, case.d, case.h, case.w, generator=g, dtype=torch.double)
    weight = random_weight((case.c, 1, *case.k), g)
    bias = random_vector(case.c, g).to(dtype) if case.bias else None
    return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": bias, "stride": case.stride}


def wide(given: dict) -> dict:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}


def serve(backend: str, **given: object) -> Tensor:
    if backend == CUDA[0]:
        with pytest.raises(BackendError, match="cuda: there is no CUDA kernel for volumes"):
            functional.depthwise_conv3d(**given, backend=backend)
        pytest.skip("refused, as it says")
    return functional.depthwise_conv3d(**given, backend=backend)


def everyday(case: Volume, dtype: torch.dtype, kernel: tuple) -> bool:
    """One row in fp16, one refusal of CUDA; in Triton's interpreter, which is slow, small volumes in one dtype."""
    number = VOLUMES.index(case)
    if kernel == CUDA or dtype == torch.float16:
        return number == 0 and (dtype == torch.float32 if kernel == CUDA else kernel != TRITON)
    return kernel != TRITON or (not case.costly and DTYPES.index(dtype) == number % 2)


def standard(case: Volume, dtype: torch.dtype, given: dict) -> Tensor:
    """What eager gives in `dtype`, from fp32 products: PyTorch's own 16-bit volumes sum some kernels in 16 bits."""
    return reference(**{k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()}).to(dtype)


@chosen(everyday)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VOLUMES, ids=str)
def test_forward(case, dtype, kernel):
    given = arguments(case, dtype)
    for memory_format in FORMATS:
        x = given["x"].contiguous(memory_format=memory_format)
        kept = x.clone()
        y = serve(kernel, **{**given, "x": x})
        assert_as_good_as_eager(y, standard(case, dtype, given), reference(**wide(given)), what=str(memory_format))
        if not (x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)):
            assert y.is_contiguous(memory_format=memory_format)
        assert torch.equal(x, kept)


@chosen(everyday)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VOLUMES, ids=str)
def test_gradients(case, dtype, kernel):
    """Of a contiguous x with a channels_last_3d gradient, and the other way round."""
    given = arguments(case, dtype)
    dy = torch.randn(reference(**wide(given)).shape, generator=generator("dy", str(case)), dtype=torch.double)
    truth = gradients(reference, wide(given), dy.to(dtype).double())
    fp32 = gradients(reference, {k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()}, dy.float())
    for memory_format, other in zip(FORMATS, FORMATS[::-1], strict=True):
        given["x"] = given["x"].contiguous(memory_format=memory_format)
        incoming = dy.to(dtype).contiguous(memory_format=other)
        found = gradients(lambda **a: serve(kernel, **a), given, incoming)
        for name, gradient in found.items():
            eager = fp32[name].to(dtype)
            assert_as_good_as_eager(gradient, eager, truth[name], what=f"gradient of {name}", scale=1.0)
            assert gradient.stride() == torch.empty_like(given[name]).stride(), name


LAYOUTS = {
    "every second channel": lambda t: torch.repeat_interleave(t, 2, dim=1)[:, ::2],
    "W outside of H": lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
    "window, channels_last_3d": lambda t: F.pad(t, (1, 2, 3, 1, 1, 1), value=torch.nan).contiguous(
        memory_format=torch.channels_last_3d
    )[:, :, 1:-1, 3:-1, 1:-2],
    "expanded scalar": lambda t: t[:1, :1, :1, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    """Of x, of the incoming gradient and of the weight."""
    given = arguments(VOLUMES[0], torch.float32)
    given["x"] = LAYOUTS[layout](given["x"])
    given["weight"] = given["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    y = serve(backend, **given)
    assert y.stride() == torch.empty_like(given["x"]).stride()
    torch.testing.assert_close(y.double(), reference(**wide(given)), rtol=1e-5, atol=1e-5)
    dy = LAYOUTS[layout](torch.randn(y.shape))
    truth = gradients(reference, wide(given), dy.double())
    for name, found in gradients(lambda **a: serve(backend, **a), given, dy).items():
        torch.testing.assert_close(found.double(), truth[name], rtol=1e-5, atol=1e-4)
        assert found.stride() == torch.empty_like(given[name]).stride()


def test_empty_batch(backend):
    given = arguments(Volume("empty", n=0, stride=2), torch.float32)
    x, weight, bias = (given[name].requires_grad_() for name in ("x", "weight", "bias"))
    y = serve(backend, x=x, weight=weight, bias=bias, stride=2)
    assert y.shape == (0, 17, 3, 2, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


# opcheck looks at .grad of the copies it makes of x, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("case", "memory_format"),
    [
        (Volume("every gradient"), torch.channels_last_3d),
        (Volume("stride 2", stride=2), torch.channels_last_3d),
        (Volume("no bias", bias=False, stride=2), torch.contiguous_format),
        (Volume("an empty batch", n=0), torch.contiguous_format),
    ],
    ids=lambda v: getattr(v, "reason", None),
)
def test_opcheck(case, memory_format):
    given = arguments(case, torch.float32)
    x = given["x"].contiguous(memory_format=memory_format)
    tensors = [x, given["weight"], given["bias"]]
    op, backward = (getattr(torch.ops.convnext_kernels, name).default for name in ("dwconv3d", "dwconv3d_backward"))
    opcheck(op, (*tensors, case.stride, "auto"))
    opcheck(op, (*(t if t is None else t.clone().requires_grad_() for t in tensors), case.stride, "auto"))
    dy = torch.randn_like(op(*tensors, case.stride, "auto"))
    opcheck(backward, (dy, *tensors, case.stride, [True, True, case.bias], "auto"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_transposed(memory_format):
    """opcheck, finite differences, an empty batch, and what is refused; values: tests/ops/test_parts.py."""
    x = torch.randn(2, 3, 2, 1, 3, dtype=torch.double).contiguous(memory_format=memory_format)
    tensors = [t.requires_grad_() for t in (x, *(torch.randn(s, dtype=torch.double) for s in ((3, 1, 3, 1, 5), (3,))))]
    op, backward = (
        getattr(torch.ops.convnext_kernels, f"dwconv3d_transposed{name}").default for name in ("", "_backward")
    )
    opcheck(op, (*tensors, 1, "auto"))
    y = op(*(t.detach() for t in tensors), 1, "auto")
    opcheck(backward, (torch.randn_like(y), *(t.detach() for t in tensors), 1, [True] * 3, "auto"))
    assert torch.autograd.gradcheck(functional.depthwise_conv_transpose3d, tensors)
    assert functional.depthwise_conv_transpose3d(x[:0], *tensors[1:]).shape == (0, 3, 3, 1, 5)
    with pytest.raises(ValueError, match="output_padding: expected 0 or 1, got 2"):
        functional.depthwise_conv_transpose3d(*tensors, output_padding=2)


@pytest.mark.parametrize("stride", [1, 2])
def test_exported_as_one_operator(stride):
    module = DepthwiseConv3d(6, 5, stride=stride)
    x = torch.randn(2, 6, 4, 5, 6)
    program = torch.export.export(module, (x,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv3d.default"]
    torch.testing.assert_close(program.module()(x), module(x))
    with exporting.keep_ops():
        kept = torch.export.export(module, (x,), strict=False)
    assert "convnext_kernels.dwconv3d.default" in {str(node.target) for node in kept.graph.nodes}


def test_flops():
    x, module = torch.randn(2, 6, 5, 4, 3, requires_grad=True), DepthwiseConv3d(6, (3, 5, 1), stride=2)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * (3 * 2 * 2) * 15


VOLUME, WEIGHT = torch.zeros(1, 4, 3, 3, 3), torch.zeros(4, 1, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": VOLUME[0]}, ValueError, r"x: expected 5 dimensions \(N, C, D, H, W\), got 4 with shape \(4, 3, 3, 3\)"),
        ({"x": VOLUME[:, :, :0]}, ValueError, r"x: C, D, H and W must be at least 1, got shape \(1, 4, 0, 3, 3\)"),
        ({"x": VOLUME.int()}, TypeError, "x: expected float32, bfloat16, float16 or float64, got torch.int32"),
        (
            {"weight": WEIGHT[:, 0]},
            ValueError,
            r"weight: expected shape \(4, 1, KD, KH, KW\) for x with C=4, got \(4, 3, 3, 3\)",
        ),
        (
            {"weight": torch.zeros(4, 1, 3, 9, 3)},
            ValueError,
            "weight: expected odd kernel sizes from 1 to 7, got 3x9x3",
        ),
        ({"weight": WEIGHT.half()}, TypeError, "weight: expected x's dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected 4 elements \(one per channel of x\), got 3"),
        ({"stride": 3}, ValueError, "stride: expected 1 or 2, got 3"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        functional.depthwise_conv3d(**({"x": VOLUME, "weight": WEIGHT} | change))


def test_module_is_a_conv3d():
    """Its parameters, their initialisation and its state dict are those of PyTorch's layer."""
    torch.manual_seed(0)
    ours = DepthwiseConv3d(6, 5, stride=2)
    torch.manual_seed(0)
    theirs = torch.nn.Conv3d(6, 6, 5, 2, 2, groups=6)
    x = torch.randn(2, 6, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
