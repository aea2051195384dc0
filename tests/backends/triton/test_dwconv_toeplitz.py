"""Large depthwise kernels on tensor cores: every tile, in the interpreter and as PTX that an emulator executes."""

import pytest
import torch

from convnext_kernels import tuning
from convnext_kernels.calls import DwconvCall
from tests.backends.triton import interpreted
from tests.operators import check
from tests.shapes import Case

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton import dwconv
from convnext_kernels.backends.triton.plans import dwconv_plan

BF16, FP16 = torch.bfloat16, torch.float16
# What is special, dtype, the tile of the forward pass and the input gradient, that of the weight gradient
# 24 channels where oneDNN's 16-bit kernels, the reference, never return with 16 or fewer (tests/shapes.py).
ROWS = [
    (Case("16 columns, more groups than rows", n=1, c=8, h=5, w=9, k=13), BF16, "c8-m16-r2", "r3-kh2"),
    (Case("32 columns, a tail of channels and of samples", n=3, c=24, h=7, w=19, k=13), BF16, "c16-m16-r2", "r4-kh2"),
    (Case("more samples than a tile, no bias", n=17, c=8, h=5, w=5, k=9, bias=False), FP16, "c8-m16-r4", "r2-kh2"),
    (Case("rows of x outside of the image", n=1, c=8, h=23, w=20, k=31), BF16, "c8-m32-r2", "r2-kh2"),
    (Case("two windows, a tail of columns", n=2, c=8, h=6, w=35, k=13), BF16, "c8-m64-r1", "r4-kh4"),
    (Case("wide windows, narrower than the kernel", n=1, c=24, h=3, w=37, k=31), FP16, "c8-m16-r2", "r3-kh2"),
    (Case("more kernel rows than rows", n=1, c=8, h=12, w=17, k=(51, 5)), BF16, "c8-m32-r2", "r4-kh2"),
    (Case("kernel rows longer than the window", n=1, c=24, h=9, w=14, k=(5, 51)), BF16, "c8-m16-r2", "r2-kh2"),
]


def forced(forward, weight):
    """Choose by a part of the name."""
    parts = {"dwconv_forward": forward, "dwconv_weight": weight}

    def choice(kernel, problem, candidates, gpu):
        return next(c for c in candidates if c.name.startswith("toeplitz") and parts[kernel] in c.name)

    return tuning.forced(choice)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].reason)
def test_parity(row, turn):
    case, dtype, forward, weight = row
    with turn(ROWS.index(row)), forced(forward, weight):
        check("dwconv", case, dtype, torch.channels_last, "triton", runs=1)


@interpreted
def test_autocast_and_residual():
    """x, dy and the residual in fp32, multiplied in bf16; a slice of the samples is read without a copy."""
    images = torch.randn(6, 8, 6, 9).contiguous(memory_format=torch.channels_last)
    x, dy, residual = images[::3], images[1::3], images[2::3]
    weight = torch.randn(8, 1, 11, 11) / 11
    call = DwconvCall(x, weight, None, (1, 1), 1, BF16)
    with forced("c8-m16-r2", "r2-kh2"):
        y = dwconv.forward(call)
        dx = dwconv.input_gradient(dy, call, residual)
        dw, _ = dwconv.parameter_gradients(dy, call, True, False)
    rounded = [t.to(BF16).double() for t in (x, weight, dy)]
    x64, weight64 = (t.requires_grad_() for t in rounded[:2])
    truth = torch.nn.functional.conv2d(x64, weight64, padding=5, groups=8)
    truth.backward(rounded[2])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), truth, **close)
    torch.testing.assert_close(dx.double(), x64.grad + residual.double(), **close)
    torch.testing.assert_close(dw.double(), weight64.grad, **close)


@interpreted
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite(value):
    """NaN where eager has it; more only in the same channel and sample, and few rows beyond the kernel."""
    x = torch.randn(2, 8, 40, 20).to(BF16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 1, 9, 9).to(BF16)
    x[1, 3, 20, 9] = value
    eager = torch.nn.functional.conv2d(x.float(), weight.float(), padding=4, groups=8)
    with forced("c8-m16-r2", "r2-kh2"):
        y = dwconv.forward(DwconvCall(x, weight, None, (1, 1), 1, BF16))
    assert not y[~eager.isfinite()].isfinite().any()
    y[1, 3, 20 - 5 : 20 + 6] = 0  # 4 rows that the kernel reaches, 1 that a group of two has more
    assert y.isfinite().all()


def test_every_tile_has_a_row():
    facts = {"samples": 8, "channels": 96, "height": 28, "width": 28, "kernel_h": 13, "kernel_w": 13}
    facts |= {"dilation_h": 1, "dilation_w": 1, "itemsize": 2, "toeplitz": True}
    for changes in ({}, {"width": 14}, {"width": 56}, {"width": 56, "kernel_w": 31}):
        problem = dwconv_plan.Problem(**(facts | changes))
        for candidates, column in ((dwconv_plan.forward_candidates, 2), (dwconv_plan.weight_candidates, 3)):
            names = [c.name for c in candidates(problem, tuning.for_arch(90)) if c.name.startswith("toeplitz")]
            assert names
            assert all(any(row[column] in name for row in ROWS) for name in names), names


def test_what_can_be_served():
    assert dwconv_plan.on_tensor_cores(8, (1, 1), 1, BF16)
    for other in ((12, (1, 1), 1, BF16), (8, (2, 1), 1, BF16), (8, (1, 1), 2, BF16), (8, (1, 1), 1, torch.float32)):
        assert not dwconv_plan.on_tensor_cores(*other)
