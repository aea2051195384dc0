"""Which depthwise kernels are offered, in the interpreter, so that nothing is compiled; pairs of channels."""

import pytest
import torch

from convnext_kernels import tuning
from convnext_kernels.calls import DwconvCall
from tests.backends.triton import interpreted
from tests.operators import check
from tests.shapes import Case

pytest.importorskip("triton", minversion="3.4", reason="needs the package triton")

from convnext_kernels.backends.triton import device, dwconv

pytestmark = interpreted


def image(begin=0):
    memory = torch.randn(3 * 10 * 2 * 9 + begin).to(torch.bfloat16)
    return memory.as_strided((3, 10, 2, 9), (180, 1, 90, 10), begin)


@pytest.fixture
def offers(monkeypatch):
    """Whether two channels per thread are offered, for each choice that was made."""
    found = []

    def choice(kernel, problem, candidates, gpu):
        found.append(any(c.name.endswith("-x2") for c in candidates))
        return candidates[0]

    def run(arch, work):
        monkeypatch.setattr(device, "gpu", lambda: tuning.for_arch(arch))
        with tuning.forced(choice):
            work()
        return found

    return run


@pytest.mark.parametrize(
    ("offered", "arch", "x"),
    [
        pytest.param(True, 100, image(), id="sm_100"),
        pytest.param(True, 103, image(), id="sm_103"),
        pytest.param(False, 90, image(), id="sm_90 has no such instruction"),
        pytest.param(False, 120, image(), id="sm_120: the assembler makes two of it"),
        pytest.param(False, 100, image(1), id="an odd address"),
        pytest.param(False, 100, image().contiguous(), id="nchw"),
        pytest.param(False, 100, image()[:, :9], id="odd channels"),
    ],
)
def test_two_channels_per_thread(offered, arch, x, offers):
    weight = torch.randn(x.shape[1], 1, 3, 3).to(torch.bfloat16)
    call = DwconvCall(x, weight, None, (1, 1), 1, x.dtype)
    assert offers(arch, lambda: (dwconv.forward(call), dwconv.input_gradient(x, call))) == [offered, offered]


def test_the_result_and_the_residual_count_too(offers):
    call = DwconvCall(image(), torch.randn(10, 1, 1, 1).to(torch.bfloat16), None, (1, 1), 1, torch.bfloat16)
    odd = image(1)
    assert offers(100, lambda: (dwconv.forward(call, odd), dwconv.input_gradient(call.x, call, odd))) == [False, False]


PAIRS = [
    Case("a moved last group", n=2, c=6, h=3, w=9, k=(1, 11)),
    Case("two strips of lines", n=1, c=34, h=12, w=5, k=(11, 1)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_of_channels(case, dtype):
    """Both images in channels_last. test_executed_dwconv.py has the compiled kernels."""
    check("dwconv", case, dtype, torch.channels_last, "triton", runs=1, scale=1.0)


NARROW = "narrower than the groups of columns of many taps"
LONG = "a line too long for the registers of the kernels for lines"


@pytest.mark.parametrize(
    "case",
    [
        Case(NARROW, n=1, c=3, h=9, w=5, k=(9, 7)),
        Case(NARROW, n=1, c=3, h=9, w=6, k=(9, 7)),
        Case(LONG, n=1, c=3, h=2, w=29, k=(1, 51), dilation=2),
    ],
    ids=lambda case: f"{case.k} {case.w}",
)
def test_there_is_a_kernel(case):
    check("dwconv", case, torch.float32, torch.channels_last, "triton", runs=1)
