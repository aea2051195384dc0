"""Where this process runs: versions, backends and why some are not available, the machine.

`convnext-kernels info` shows it, and benchmark results record it.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import warnings
from pathlib import Path

from convnext_kernels.tuning.cpus import cpu_name
from convnext_kernels.version import __version__

PACKAGES = ("torch", "triton", "numpy", "torchvision", "timm", "transformers", "openvino", "onnxruntime")
VARIABLES = (
    "CONVNEXT_KERNELS_BACKEND",
    "CONVNEXT_KERNELS_CPU_ISA",
    "OMP_NUM_THREADS",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "OMP_PROC_BIND",
)
# Others are shown where they are set: of the build and of this package, and what PyTorch and Triton follow.
PREFIXES = ("CNK_", "CONVNEXT_KERNELS_", "TRITON_", "OMP_", "KMP_", "MKL_", "CUDA_", "HIP_", "PYTORCH_", "TORCH")
# What the kernels are chosen by, of the flags in /proc/cpuinfo.
CPU_FEATURES = re.compile(r"(avx|amx|fma|f16c|asimd|bf16|i8mm|sve|fphp|fcma)\w*")


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


def built() -> dict[str, str | None]:
    """Return what setup.py wrote into a wheel: its commit, Python, and why it has no compiled kernels; {} elsewhere."""
    try:
        return json.loads(Path(__file__).with_name("built.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def driver() -> str | None:
    """Return the version of NVIDIA's driver, also where PyTorch cannot use it; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def cpu_features() -> list[str]:
    """Return the instruction sets of the CPU that matter here, as Linux reports them; [] on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flag for flag in set(flags.split()) if CPU_FEATURES.fullmatch(flag))


def variables() -> dict[str, str | None]:
    """Return `VARIABLES`, with None where one is not set, and the set ones with a name of `PREFIXES`."""
    others = sorted(name for name in os.environ if name.startswith(PREFIXES) and name not in VARIABLES)
    return {name: os.environ.get(name) for name in (*VARIABLES, *others)}


def commit() -> str | None:
    """Return the commit this package runs from or was built from, with "-dirty" for changed files; None if unknown."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails in another repository that contains the environment
        return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return built().get("commit")


def collect() -> dict[str, object]:
    """Everything that ``info`` shows, as plain values for JSON."""
    import torch

    from convnext_kernels.dispatch import compiled_for_cuda, list_backends

    found, reason = gpus()
    return {
        "convnext_kernels": __version__,
        "built": built(),
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
        "cpu": {
            "name": cpu_name(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "features": cpu_features(),
        },
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "torch_built_for": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "gpus": found,
        "driver": driver(),
        "no_gpu_reason": reason,
        "environment": variables(),
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


def _built(values: dict[str, object]) -> str:
    """One line about the build: the version, where it comes from, and why it is pure Python."""
    commit_, made = values.get("commit"), values.get("built", {})
    parts = [f"commit {commit_}" if commit_ else "commit unknown"]
    if made.get("python"):
        parts.append(f"built by Python {made['python']}")
    if made.get("pure_python"):
        parts.append(f"without compiled kernels: {made['pure_python']}")
    return f"{values['convnext_kernels']} ({', '.join(parts)})"


def rows(values: dict[str, object]) -> list[tuple[str, str]]:
    """Return (name, value) pairs of what `collect` found, without the backends."""
    threads = values["threads"]
    return [
        ("convnext-kernels", _built(values)),
        ("Python", f"{values['python']} on {values['platform']}"),
        *((name, version or "not installed") for name, version in values["libraries"].items()),
        # records that were made before have no such entries
        *(
            ("PyTorch is built for", f"{kind.upper()} {version}")
            for kind, version in values.get("torch_built_for", {}).items()
            if version
        ),
        ("CPU", f"{values['cpu']['name']} (PyTorch uses {values['cpu']['torch_capability']})"),
        *((("CPU features", " ".join(values["cpu"]["features"])),) if values["cpu"].get("features") else ()),
        # results that were recorded before the CUDA kernels existed have no such entry
        *((("CUDA kernels", _cuda_extension(values["cuda_extension"])),) if "cuda_extension" in values else ()),
        ("threads", f"{threads['torch']} of PyTorch, {threads['cores']} cores"),
        *((("NVIDIA driver", values["driver"]),) if values.get("driver") else ()),
        ("GPU", "\n".join(values["gpus"]) or f"none: {values['no_gpu_reason']}"),
        *((name, "not set" if value is None else value) for name, value in values["environment"].items()),
    ]
