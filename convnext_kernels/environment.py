"""Where this process runs: versions, backends and why some are not available, the machine.

`convnext-kernels info` shows it, and benchmark results record it.
"""

import importlib.metadata
import os
import platform
import subprocess
import warnings
from pathlib import Path

from convnext_kernels.tuning.cpus import cpu_name
from convnext_kernels.version import __version__

PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "openvino", "onnxruntime")
VARIABLES = (
    "CONVNEXT_KERNELS_BACKEND",
    "CONVNEXT_KERNELS_CPU_ISA",
    "OMP_NUM_THREADS",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "OMP_PROC_BIND",
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> tuple[list[str], str]:
    """Return the GPUs that PyTorch can use and, when there is none, the reason."""
    import torch

    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        return [], "this PyTorch is built without CUDA and ROCm"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        detail = f": {' '.join(str(caught[0].message).split())}" if caught else ""
        return [], f"PyTorch (built for {built_for}) finds no usable GPU or driver{detail}"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB")
    return found, ""


def commit() -> str | None:
    """Return the commit this package runs from, with "-dirty" for changed files; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails in another repository that contains the environment
        return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def collect() -> dict[str, object]:
    """Everything that ``info`` shows, as plain values for JSON."""
    import torch

    from convnext_kernels.dispatch import compiled_for_cuda, list_backends

    found, reason = gpus()
    return {
        "convnext_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in PACKAGES},
        "backends": {
            status.name: {
                "available": status.available,
                "reason": status.reason,
                "description": status.description,
            }
            for status in list_backends().values()
        },
        "cuda_extension": compiled_for_cuda(),
        "cpu": {"name": cpu_name(), "torch_capability": torch.backends.cpu.get_cpu_capability()},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "gpus": found,
        "no_gpu_reason": reason,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _cuda_extension(compiled: dict[str, object]) -> str:
    """One line about the CUDA kernels: what they are built for and whether the driver can run them."""
    if not compiled["built"]:
        return f"not built: {compiled['reason']}"
    if not compiled["architectures"]:
        return "built for the CPU (for tests)"
    names = [f"sm_{architecture}" for architecture in compiled["architectures"]]
    built = f"CUDA {compiled['toolkit']}, {', '.join(names)} and PTX for {names[-1]}"
    driver = compiled["driver"]
    return f"{built}; " + (f"the driver cannot run them: {driver}" if driver else "the driver can run them")


def rows(values: dict[str, object]) -> list[tuple[str, str]]:
    """Return (name, value) pairs of what `collect` found, without the backends."""
    threads = values["threads"]
    return [
        ("convnext-kernels", values["convnext_kernels"]),
        ("Python", f"{values['python']} on {values['platform']}"),
        *((name, version or "not installed") for name, version in values["libraries"].items()),
        ("CPU", f"{values['cpu']['name']} (PyTorch uses {values['cpu']['torch_capability']})"),
        # results that were recorded before the CUDA kernels existed have no such entry
        *((("CUDA kernels", _cuda_extension(values["cuda_extension"])),) if "cuda_extension" in values else ()),
        ("threads", f"{threads['torch']} of PyTorch, {threads['cores']} cores"),
        ("GPU", "\n".join(values["gpus"]) or f"none: {values['no_gpu_reason']}"),
        *((name, "not set" if value is None else value) for name, value in values["environment"].items()),
    ]
