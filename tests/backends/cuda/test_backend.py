"""Asking for the CUDA kernels where they cannot run, and what they say of themselves."""

import importlib

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import calls
from convnext_kernels.backends import cuda
from convnext_kernels.backends.cuda import native
from convnext_kernels.backends.gpu.prepared import Program
from tests.operators import OPERATORS, check_forward, check_gradients
from tests.shapes import Case


class Extension:
    """Stands in for the compiled extension on machines of all kinds."""

    HOST = False
    ARCHITECTURES = "75 90"
    TOOLKIT = "13.0"

    def __init__(self, driver: str = "", device: str = "") -> None:
        self.driver, self.device = driver, device

    def driver_problem(self) -> str:
        return self.driver

    def device_problem(self, device: int) -> str:
        return self.device


@pytest.fixture
def extension(monkeypatch):
    choices = importlib.import_module("convnext_kernels.dispatch")._able

    def install(loaded):
        monkeypatch.setattr(native, "_load", lambda: loaded)
        monkeypatch.setattr(cuda, "_device_problem", cuda._device_problem.__wrapped__)  # nothing remembered
        choices.cache_clear()

    yield install
    monkeypatch.undo()
    choices.cache_clear()


def test_without_a_driver(extension):
    extension(Extension(driver="CUDA driver version is insufficient (cudaErrorInsufficientDriver)"))
    reason = r"driver cannot run the kernels \(built for sm_75, sm_90\): .*cudaErrorInsufficientDriver"
    with pytest.raises(ck.BackendError, match=rf"backend 'cuda' is not available: .*{reason}"), ck.use_backend("cuda"):
        pass
    with pytest.raises(ck.BackendError, match=reason):
        ck.functional.depthwise_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="cuda")
    assert cuda.compiled()["driver"].startswith("CUDA driver version")


def test_tensors_on_the_cpu_are_refused_by_the_real_extension(extension, monkeypatch):
    extension(Extension())
    monkeypatch.setattr(cuda, "_device_problem", lambda: None)
    with pytest.raises(ck.BackendError, match="tensors are on cpu, the CUDA kernels run on cuda"):
        ck.functional.depthwise_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), backend="cuda")


@pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host")
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_replayed_calls(variant):
    """The second call of a signature replays the first, with other tensors and temporaries in one allocation."""
    case = Case("tails in pixels and channels", n=2, c=40, h=5, w=7, variant=variant)
    arguments = OPERATORS["block"].arguments(case, torch.float32)
    dy = torch.randn_like(arguments["x"])
    calls.forget()
    other = {k: v * 0.5 if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for given in (other, arguments):
        check_gradients("block", given, dy, "cuda")
    check_forward("block", arguments, "cuda")
    programs = [
        program
        for known in calls._known.values()
        for entry in known
        for program in entry.signature.memo.values()
        if isinstance(program, Program)
    ]
    assert len(programs) == 3  # with and without a gradient, and the gradient
    assert all(program.replay is not None for program in programs)


@pytest.mark.skipif(not native.on_host(), reason="needs the CUDA kernels built for the host")
@pytest.mark.parametrize("shape", [(2**33, 8, 1, 1), (2**17, 96, 256, 256), (2, 4, 2**16, 2**16)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_grids_of_2_to_the_33_pixels(shape, channels_last, recorded):
    """N * H * W up to 2^33: launches stay within the limits of a grid; nothing is run."""
    n, c, h, w = shape
    bf16, launches, extension = native.DTYPE_CODES[torch.bfloat16], recorded(), native.extension()
    image = (1 << 40, bf16, c * h * w, *((1, w * c, c) if channels_last else (h * w, w, 1)))
    of = extension.Convolution(n, c, h, h, 7, 1, w, w, 7, 1, 1, 1)
    extension.dwconv((0, 0), of, image, image, None, 1 << 41, None, False)
    assert extension.dwconv_weight_parts((0, 0), 1, of) <= 352
    extension.dwconv_weight_gradient((0, 0), of, image, image, None, None, 1 << 42)
    rows, vector = (*image[:3], *((c, 1) if channels_last else (1, h * w))), (1 << 41, bf16)
    sizes, patches = (n, h * w, c), (2, h, w)
    extension.layernorm((0, 0), rows, rows, vector, vector, 1e-6, *sizes, *patches, 0)
    parts = extension.layernorm_parts((0, 0), n * h * w)
    assert parts <= 2 * 132
    extension.layernorm_backward((0, 0), rows, rows, rows, vector, 1 << 42, parts, 1e-6, *sizes, *patches, 0)
    extension.grn_sums((0, 0), rows, rows, *[1 << 42] * 3, *sizes)
    extension.grn_apply((0, 0), rows, rows, rows, 1 << 42, 1 << 42, None, *sizes)
    assert len(launches) == 3 + 4
    assert all(1 <= launch.grid <= 2**31 - 1 for launch in launches)
    assert all(launch.shared_bytes <= 48 << 10 for launch in launches[3:])
