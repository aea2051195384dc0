"""The depthwise convolution as PTX, executed by an emulator that checks accesses and races.

Every kernel, forward and gradients, at shapes with tails in columns, rows, channels and samples.
"""

import functools

import pytest
import torch

from convnext_kernels import tuning
from convnext_kernels.calls import DwconvCall
from tests.operators import OPERATORS, check, expected_gradients, gradients
from tests.shapes import VOLUMES, Case
from tests.tolerance import assert_as_good_as_eager

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton import dwconv

CASES = {
    "1x1": Case("no neighbours", n=1, c=5, h=3, w=9, k=1),
    "3x3": Case("a tail of columns, more than a warp of channels", n=2, c=33, h=5, w=9, k=3),
    "plane": Case("a whole plane per thread", n=3, c=13, h=4, w=5, k=5),
    "7x7": Case("two groups of columns", n=1, c=10, h=9, w=15),
    "one group": Case("a group of columns as wide as the image", n=1, c=10, h=9, w=7),
    "28": Case("one group, its taps outside masked", n=1, c=5, h=4, w=28),
    "dilated": Case("three residues of rows, taps beyond the next group", n=1, c=10, h=8, w=11, k=5, dilation=3),
    "pairs": Case("an odd number of rows, of which the last has no partner", n=1, c=10, h=17, w=8, k=13, bias=False),
    "dilated pairs": Case("partners two rows apart", n=1, c=6, h=7, w=9, k=9, dilation=2),
    "31x31": Case("most taps fall outside", n=1, c=6, h=5, w=4, k=31),
    "1x11": Case("one kernel row, an odd number of channels", n=1, c=5, h=4, w=17, k=(1, 11)),
    "1x11 pairs": Case("pairs of channels, a moved last group", n=3, c=34, h=5, w=16, k=(1, 11)),
    "11x1 pairs": Case("a line as wide as a group, its taps outside not compiled", n=2, c=6, h=28, w=3, k=(11, 1)),
    "21x1": Case("many kernel rows, one column, an even dilation", n=1, c=6, h=25, w=6, k=(21, 1), dilation=(2, 1)),
    "9x7": Case("more taps than registers, packed", n=1, c=6, h=9, w=9, k=(9, 7)),
    "strided": Case("both phases, a moved last group", n=1, c=6, h=9, w=15, k=(5, 7), stride=2),
    "strided, even": Case("an even and an odd dilation", n=1, c=5, h=8, w=12, k=3, stride=2, dilation=(2, 3)),
}
ROWS = [
    ("1x1", torch.bfloat16, ""),
    ("3x3", torch.float32, "rolling"),
    ("plane", torch.float16, "plane"),
    ("plane", torch.bfloat16, "rolling"),
    ("7x7", torch.bfloat16, "rolling"),
    ("7x7", torch.float16, "rows"),
    ("7x7", torch.bfloat16, "rolling-q7"),
    ("one group", torch.bfloat16, "rolling-q7"),
    ("one group", torch.float16, "rows-q7"),
    ("28", torch.bfloat16, "rows-q28"),
    ("dilated", torch.bfloat16, "rolling"),
    ("dilated", torch.float32, "rows"),
    ("pairs", torch.bfloat16, "pairs"),
    ("pairs", torch.float16, "rows"),
    ("dilated pairs", torch.float32, "pairs"),
    ("31x31", torch.bfloat16, "pairs"),
    ("1x11", torch.bfloat16, "q7"),
    ("1x11 pairs", torch.bfloat16, "q7"),
    ("1x11 pairs", torch.float16, "q14"),
    ("11x1 pairs", torch.float16, "q28"),
    ("11x1 pairs", torch.float32, "q7"),
    ("21x1", torch.bfloat16, "q14"),
    ("21x1", torch.float32, "q7"),
    ("9x7", torch.bfloat16, "pairs"),
    ("strided", torch.bfloat16, ""),
    ("strided, even", torch.float16, ""),
]


def plan_named(part: str):
    """Force a plan of the forward pass and the input gradient by a part of its name: the last that has it."""

    def choice(kernel, problem, candidates, gpu):
        named = [c for c in candidates if part in c.name]
        if not part or kernel != "dwconv_forward":
            return None
        assert named or not part.endswith("x2")
        return named[-1] if named else None

    return tuning.forced(choice)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("case", "dtype", "plan"), ROWS)
def test_executed(case, dtype, plan, layout, architecture):
    with plan_named(plan):
        check("dwconv", CASES[case], dtype, layout, "triton")


X2 = [
    ("7x7", torch.bfloat16, "rolling-q4-s2-x2"),
    ("7x7", torch.float16, "rows-q7-x2"),
    ("dilated", torch.float32, "rows-q7-x2"),
    ("pairs", torch.bfloat16, "rows-q7-pairs-x2"),
]


@pytest.mark.parametrize(("case", "dtype", "plan"), X2)
def test_two_channels_per_thread(case, dtype, plan, emulate):
    with emulate(100), plan_named(plan):
        check("dwconv", CASES[case], dtype, torch.channels_last, "triton", runs=1)


def test_two_channels_under_autocast(emulate):
    """x, dy, the weight and the residual in fp32, multiplied in bf16."""
    x, dy, residual = (torch.randn(2, 6, 5, 9).contiguous(memory_format=torch.channels_last) for _ in range(3))
    weight = torch.randn(6, 1, 3, 3)
    call = DwconvCall(x, weight, None, (1, 1), 1, torch.bfloat16)
    with emulate(100), plan_named("rolling-q4-s1-x2"):
        y, dx = dwconv.forward(call), dwconv.input_gradient(dy, call, residual)
    x64, weight64, dy64 = (t.to(torch.bfloat16).double() for t in (x, weight, dy))
    x64.requires_grad_()
    truth = torch.nn.functional.conv2d(x64, weight64, padding=1, groups=6)
    truth.backward(dy64)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), x64.grad + residual.double(), rtol=1e-5, atol=1e-5)


_volume = functools.partial(Case, c=5, h=4, w=9, k=3, ops=VOLUMES)
VOLUME_ROWS = [
    (_volume("a tail of columns, partners of rows", c=10, h=5), torch.bfloat16, "rows-q7-pairs"),
    (_volume("one row per thread, no partner", d=4, h=3, w=15, k=(5, 3, 7), n=1), torch.float32, "rows-q14"),
    (_volume("smaller than the kernel", d=2, h=1, w=3, k=7, n=1), torch.float16, ""),
    (_volume("both phases of all axes", d=5, stride=2), torch.bfloat16, ""),
    (_volume("one kernel plane, even sizes", d=4, w=8, k=(1, 3, 5), stride=2), torch.float32, ""),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("case", "dtype", "plan"), VOLUME_ROWS, ids=lambda v: getattr(v, "reason", v))
def test_volumes(case, dtype, plan, layout, architecture):
    with plan_named(plan):
        check("dwconv3d", case, dtype, layout, "triton", runs=1, scale=1.0)


@pytest.mark.parametrize("moved", ["x", "dy"])
def test_odd_address(moved, architecture):
    """Pairs of channels are read only where every address is a multiple of 4; a tensor may begin elsewhere."""
    case, dtype = CASES["1x11 pairs"], torch.bfloat16
    arguments = OPERATORS["dwconv"].arguments(case, dtype)
    dy, eager, reference = expected_gradients("dwconv", case, dtype)

    def odd(t):
        odd = torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return odd.copy_(t)

    if moved == "x":
        arguments["x"] = odd(arguments["x"])
    else:
        dy = odd(dy)
    actual = gradients(lambda **a: OPERATORS["dwconv"].serve("triton", **a), arguments, dy)
    for name, gradient in actual.items():
        assert_as_good_as_eager(gradient, eager[name], reference[name], what=name)
