"""AOTInductor compiles an accelerated network for CUDA, with our Triton kernels inside its package, without a GPU.

    python proofs/aoti_cuda.py [--arch 80]

The tensors are fake, so the package has no weights, and nothing is run. Inductor asks the GPU for its properties, and
then runs each kernel once to choose between configurations: both are replaced here, for PyTorch 2.14. Kernels and C++
are compiled and linked as on a machine with a GPU; libcuda, which is the driver's, is an empty library.

Needs g++ and CUDA's headers (nvcc's, or those of the folder CUDA_HOME).
"""

import os
import shutil
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if "CUDA_HOME" not in os.environ:  # before PyTorch asks; nvcc may be a script elsewhere
    homes = [Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parents[1], Path("/usr/local/cuda")]
    os.environ["CUDA_HOME"] = next((str(home) for home in homes if (home / "include/cuda.h").exists()), str(homes[0]))

import click
import torch
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver as drivers

import convnext_kernels as ck
from convnext_kernels.backends.triton.ahead import TargetDriver
from convnext_kernels.models import ConvNeXt

OPTIONS = {
    "triton.autotune_at_compile_time": True,
    "use_static_triton_launcher": False,  # a launcher that loads the kernel at once
    "shape_padding": False,  # decided by timing
    "compile_threads": 1,
    "aot_inductor.package_constants_in_so": False,
}


def torchvision_v1() -> torch.nn.Module:
    """ConvNeXt V1 of torchvision with few blocks, accelerated."""
    stages = [CNBlockConfig(96, 192, 1), CNBlockConfig(192, 384, 1), CNBlockConfig(384, None, 1)]
    return ck.accelerate(TorchvisionConvNeXt(stages, num_classes=10))


MODELS = {
    "V1": torchvision_v1,
    "V2": lambda: ConvNeXt((1, 1), (96, 192), num_classes=10, use_grn=True),
}


def program(build: Any, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """A network with our ops and without weights, exported for the GPU."""
    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True, export=True)
    model = build().to(dtype).eval()
    with mode, torch.device("cuda:0"):
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=dtype)))
        x = torch.empty(2, 3, 224, 224, dtype=dtype)
    with ck.keep_ops(), tracing(TracingContext(mode)):
        return torch.export.export(model, (x,))


def compile_only(wrapper: PythonWrapperCodegen) -> None:
    """In place of `generate_and_run_autotune_block`: the first configuration of each kernel, which is not run."""
    wrapper.kernel_autotune_defs.splice("async_compile.wait(globals())")
    scope: dict[str, Any] = {}
    exec(wrapper.kernel_autotune_defs.getvalue(), scope)
    for kernel in scope.values():
        if isinstance(kernel, CachingAutotuner):
            kernel.precompile()
            kernel.save_gpu_kernel(0, kernel.launchers[0])


def not_loaded(kernel: CompiledKernel) -> None:
    """In place of `CompiledKernel._init_handles`: there is nowhere to load a kernel."""
    kernel.module = kernel.function = kernel.n_regs = kernel.n_spills = 0
    kernel.n_max_threads = 1024
    kernel._run = None


def absent_gpu(arch: int) -> list[Any]:
    """What stands for the GPU that inductor asks, as patches."""
    properties = SimpleNamespace(
        name="H100",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        total_memory=80 << 30,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_raw_stream": 0,
        "get_compute_capability": arch,
        "get_device_properties": properties,
    }
    state = torch.zeros(16, dtype=torch.uint8)
    cuda = {"get_rng_state": state, "set_rng_state": None, "get_device_capability": (arch // 10, arch % 10)}
    cuda |= {name: answers[name] for name in ("current_device", "device_count", "get_device_properties")}
    cuda |= {"_exchange_device": 0, "_maybe_exchange_device": 0, "is_bf16_supported": True, "synchronize": None}

    def says(answer: Any) -> Any:
        return lambda *_, **__: answer

    worker = {name: answers[name] for name in ("current_device", "get_device_properties", "set_device")}
    return [
        *(mock.patch.object(CudaInterface, name, staticmethod(says(answer))) for name, answer in answers.items()),
        *(mock.patch.object(CudaInterface.Worker, n, staticmethod(says(answer))) for n, answer in worker.items()),
        *(mock.patch.object(torch.cuda, name, says(answer)) for name, answer in cuda.items()),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", says(0)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", says(None)),
        mock.patch.object(CompiledKernel, "_init_handles", not_loaded),
        mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", compile_only),
    ]


def check(package: Path) -> None:
    """Print the kernels of a package; raise AssertionError if our ops are called, or our kernels are missing."""
    with zipfile.ZipFile(package) as files:
        names = files.namelist()
        (wrapper,) = (files.read(name).decode() for name in names if name.endswith(".wrapper.cpp"))
        cubins = [files.read(name) for name in names if name.endswith(".cubin")]
        metadata = "".join(files.read(name).decode() for name in names if name.endswith(".json"))
    launched = Counter(
        line.split("(")[0].removeprefix("call_")
        for line in (line.strip() for line in wrapper.splitlines())
        if line.startswith("call_")
    )
    ours = {name: count for name, count in launched.items() if not name.startswith("triton_")}
    print(
        f"{package.name}: {len(cubins)} kernels; launches of ours: {ours}; of inductor's: {len(launched) - len(ours)}"
    )
    assert all(cubin[:4] == b"\x7fELF" for cubin in cubins)
    assert any(name.endswith(".wrapper.so") for name in names)
    assert "convnext_kernels::" not in wrapper + metadata, "our ops are called, not launched"
    assert any("rows_kernel" in name or "rolling_kernel" in name or "plane_kernel" in name for name in ours), ours
    assert any("mlp_" in name for name in ours), ours


@click.command(help=__doc__.partition("\n")[0])
@click.option("--arch", default=90, help="Compute capability, 80 for 8.0.")
def main(arch: int) -> None:
    torch.set_grad_enabled(False)
    drivers.set_active(TargetDriver(GPUTarget("cuda", arch, 32), "cuda:0"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text("")
        driver = Path(folder) / "libcuda.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver, source], check=True)
        os.environ["LIBRARY_PATH"] = f"{folder}:{os.environ.get('LIBRARY_PATH', '')}"
        for patch in absent_gpu(arch):
            patch.start()
        for name, build in MODELS.items():
            for dtype in (torch.bfloat16, torch.float32):
                package = Path(folder) / f"{name}-{str(dtype).removeprefix('torch.')}.pt2"
                exported = program(build, dtype)
                with ck.inline_kernels():
                    torch._inductor.aoti_compile_and_package(
                        exported, package_path=str(package), inductor_configs=OPTIONS
                    )
                check(package)


if __name__ == "__main__":
    main()
