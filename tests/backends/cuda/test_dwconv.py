"""The depthwise kernels beyond what the general suites run: thread order, grids that loop, PTX, offsets, huge grids."""

import pytest
import torch

from convnext_kernels.backends import cuda
from convnext_kernels.backends.cuda import dwconv, native
from convnext_kernels.calls import DwconvCall
from convnext_kernels.spec import OpSpec
from tests.backends.cuda import executed
from tests.operators import check
from tests.shapes import Case

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "1x1": (BF16, Case("no neighbours", n=1, c=5, h=3, w=9, k=1)),
    "3x3": (BF16, Case("16-byte loads, a tail of columns and of rows", n=2, c=40, h=5, w=9, k=3)),
    "5x5": (FP16, Case("less than a group of four channels", n=3, c=3, h=4, w=5, k=5)),
    "7x7": (BF16, Case("two tiles and tails", n=1, c=16, h=17, w=30)),
    "7x7 fp32": (FP32, Case("two tiles and tails", n=1, c=16, h=17, w=30)),
    "odd": (FP16, Case("channels that no 16-byte load divides", n=2, c=13, h=9, w=15)),
    "dilated": (BF16, Case("lattices of different sizes, far taps", n=1, c=8, h=8, w=11, k=5, dilation=3)),
    "far": (FP32, Case("only the middle tap sees the image", n=1, c=8, h=3, w=4, k=7, dilation=10**12)),
    "9x9": (BF16, Case("a kernel row in two chunks", n=1, c=8, h=12, w=10, k=9)),
    "11x11": (FP32, Case("chunks of six", n=1, c=8, h=12, w=10, k=11, bias=False)),
    "13x13": (BF16, Case("chunks of seven and six", n=1, c=16, h=13, w=8, k=13)),
    "15x15": (FP16, Case("a kernel without an instance of its own", n=1, c=8, h=9, w=23, k=15)),
    "31x31": (BF16, Case("most taps fall outside", n=1, c=8, h=5, w=4, k=31)),
    "1x11": (BF16, Case("no rows above and below, chunks of six and five", n=1, c=8, h=5, w=17, k=(1, 11))),
    "11x1": (FP16, Case("chunks of one tap", n=1, c=16, h=17, w=9, k=(11, 1))),
    "strided": (BF16, Case("four parts, the last row is of centres", n=1, c=16, h=17, w=33, k=(7, 5), stride=2)),
    "strided, even": (FP32, Case("an even and an odd dilation", n=1, c=5, h=10, w=16, k=3, stride=2, dilation=(2, 3))),
    "51x5": (BF16, Case("more rows than threads of a tap", n=1, c=8, h=9, w=8, k=(51, 5), dilation=(1, 2))),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
def test_either_thread_order_and_looping_grids(case, layout, host):
    for last_first, limit in ((False, 2), (True, 5)):
        host(last_first=last_first, grid_limit=limit)
        check("dwconv", CASES[case][1], CASES[case][0], layout, "cuda")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", [80, 90], ids=lambda arch: f"sm_{arch}")
def test_executed(arch, case, layout):
    with executed.executed(arch) as run:
        check("dwconv", CASES[case][1], CASES[case][0], layout, "cuda")
    assert len(run.launches) == 1 + 2 * 4  # forward; forward, input gradient, partial sums and their sum, twice


@pytest.mark.parametrize("arch", [75, 86, 100, 120], ids=lambda arch: f"sm_{arch}")
def test_executed_elsewhere(arch):
    """Other GPUs have other tiles: less shared memory, other numbers of multiprocessors."""
    with executed.executed(arch):
        check("dwconv", CASES["7x7"][1], BF16, torch.channels_last, "cuda")


@pytest.mark.parametrize("shared_bytes", [65536, 101376, 232448])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7), (13, 13), (15, 15), (31, 31), (51, 5), (5, 51), (51, 1)])
def test_every_gpu_has_a_tile(kernel, shared_bytes, recorded):
    """Whatever the image, a tile fits into the least shared memory of the architectures that are compiled for."""
    for size in (1, 7, 14, 56, 513):
        for dtype in (torch.float32, torch.bfloat16):
            launches = recorded(shared_bytes=shared_bytes)
            x = torch.empty(1, 64, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.empty(64, 1, *kernel, dtype=dtype)
            call = DwconvCall(x, weight, None, (1, 1), 1, dtype)
            dwconv.forward(call)
            dwconv.parameter_gradients(x, call, True, False)
            assert len(launches) == 3
            assert all(launch.shared_bytes <= shared_bytes and launch.threads % 32 == 0 for launch in launches)


@pytest.mark.parametrize(("shared_bytes", "served"), [(65536, False), (101376, False), (232448, True)])
def test_what_no_tile_fits_is_refused(shared_bytes, served, recorded):
    """The largest kernel in 16 bits: "auto" then takes another backend; where it is served there is a tile."""
    launches = recorded(shared_bytes=shared_bytes)
    spec = OpSpec("dwconv", "cpu", torch.bfloat16, torch.bfloat16, 64, (51, 51))
    reason = cuda.refuses(spec)
    assert (reason is None) == served, reason
    assert served or f"a 51x51 kernel needs 127 KB of shared memory, this GPU has {shared_bytes >> 10}" in reason
    if served:
        x = torch.empty(1, 64, 513, 513, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        call = DwconvCall(x, torch.empty(64, 1, 51, 51, dtype=torch.bfloat16), None, (1, 1), 1, torch.bfloat16)
        dwconv.forward(call)
        dwconv.parameter_gradients(x, call, True, False)
        assert len(launches) == 3


def test_a_failed_launch_names_kernel_and_shape(host):
    host(shared_bytes=1024)
    x = torch.zeros(1, 8, 14, 15).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"dwconv_kernel.*shared memory"):
        dwconv.forward(DwconvCall(x, torch.zeros(8, 1, 31, 31), None, (1, 1), 1, torch.float32))
