"""The CUDA kernels built for the CPU: the same sources, each thread of a block a fiber (csrc/cuda/host)."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = "_native_cuda_host"
VARIABLE = "CONVNEXT_KERNELS_CUDA_EXTENSION"  # which extension the package loads (backends/cuda/native.py)


@functools.cache
def missing_tools() -> str:
    """What building needs and this machine lacks; empty when all is there."""
    lacking = [name for name in ("cmake", "ninja") if not tool(name)]
    lacking += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    lacking += [] if shutil.which(os.environ.get("CXX", "g++")) else ["a C++ compiler (g++)"]
    lacking += [] if (ROOT / "CMakeLists.txt").exists() else ["the sources"]  # a copy of the tests alone
    return ", ".join(lacking)


def tool(name: str) -> str | None:
    """A program that a package of this environment brought, or one on PATH."""
    return shutil.which(name, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))


def build(
    folder: Path = ROOT / "build" / "cuda_host", source: Path = ROOT, *options: str, target: str = TARGET
) -> Path:
    """Build the extension of the sources in `source` and return its file; what is up to date is kept.

    `options` go to CMake (``-DCNK_SANITIZE=address,undefined``). Raises RuntimeError with the compiler's words.
    """
    import pybind11
    from filelock import FileLock

    cmake = tool("cmake")
    commands = (
        [
            cmake,
            *("-S", source, "-B", folder, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCNK_CUDA_HOST=ON",
            # -O1, because compiling takes longer than the tests.
            *("-DCMAKE_BUILD_TYPE=Host", "-DCMAKE_CXX_FLAGS_HOST=-O1"),
            *options,
        ],
        [cmake, "--build", folder, "--target", target],
    )
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # other test runs may start at the same time
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return next(folder.glob(f"{target}.*.so"))
