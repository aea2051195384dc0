"""Build of the compiled extensions with CMake. PyTorch is not needed. Everything else is in pyproject.toml.

Environment variables:

    CNK_NATIVE              auto (default): compile where a C++ compiler works, else install pure Python; 1: a missing
                            compiler is an error; 0: pure Python
    CNK_CUDA, CNK_CUDA_ARCHITECTURES    which GPUs to compile for: csrc/cuda/build.cmake
    CXX, CMAKE_ARGS         the C++ compiler; further options for CMake, such as -DCNK_WERROR=ON

We call CMake ourselves because the build folder must outlive pip's isolated environment: a second `pip install` then
compiles only what changed. scikit-build-core clears its folder when that environment moves, which it always does.
"""

import filecmp
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
# std::span needs a C++20 library as well as a C++20 compiler; Python.h is what a separate package (python3-dev) brings.
PROBE = "#include <Python.h>\n#include <span>\nint main() { return static_cast<int>(std::span<int>().size()); }\n"


def find_compiler() -> tuple[str, str]:
    """Return (a C++ compiler that can build an extension, "") or ("", why there is none)."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    reason = f"no C++ compiler was found ({', '.join(candidates)})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        for candidate in candidates:
            command = shlex.split(candidate)
            if not shutil.which(command[0]):
                continue
            options = ["-std=c++20", "-c", f"-I{sysconfig.get_path('include')}", source, "-o", source.with_suffix(".o")]
            done = subprocess.run([*command, *options], capture_output=True, text=True)
            if done.returncode == 0:
                return candidate, ""
            first_error = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no message")
            reason = f"{candidate} cannot compile a C++20 Python extension: {first_error.strip()}"
    return "", reason


def choose_compiler() -> tuple[str, str]:
    """Return (the compiler to use, "") or, for a pure Python package, ("", why)."""
    wanted = os.environ.get("CNK_NATIVE", "").lower() or "auto"
    if wanted in ("0", "off", "no", "false"):
        print("convnext_kernels: pure Python, as CNK_NATIVE=0 asks", file=sys.stderr)
        return "", "CNK_NATIVE=0"
    if wanted not in ("auto", "1", "on", "yes", "true"):
        raise SystemExit(f'CNK_NATIVE: expected auto, 0 or 1, got "{wanted}"')
    compiler, reason = find_compiler()
    if not compiler:
        help_ = "install g++ 11 or newer, or clang 15 or newer, and Python's headers (python3-dev)"
        if wanted != "auto":
            raise SystemExit(f"CNK_NATIVE=1, but {reason}; {help_}")
        print(f"convnext_kernels: pure Python, without the CPU and CUDA kernels: {reason}; {help_}", file=sys.stderr)
    return compiler, reason


def stable_copy(package: Path, copy: Path) -> Path:
    """Copy a package that pip will delete again; files that are the same stay as they are, so nothing is recompiled."""

    def copy_changed(source: str, destination: str) -> None:
        if not os.path.exists(destination) or not filecmp.cmp(source, destination, shallow=False):
            shutil.copyfile(source, destination)

    shutil.copytree(package, copy, copy_function=copy_changed, dirs_exist_ok=True)
    return copy


BUILT = "built.json"  # in the package: what `convnext-kernels info` says about the build


def commit() -> str | None:
    """Return the commit of a checkout, with "-dirty" for changed files; of an sdist, the commit it was made from."""
    if (ROOT / ".git").exists():
        describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
        try:
            return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    written = ROOT / "convnext_kernels" / BUILT
    return json.loads(written.read_text())["commit"] if written.exists() else None


class Sdist(sdist):
    """Write the commit into the sdist."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add a file to what setuptools copies."""
        super().make_release_tree(base_dir, files)
        Path(base_dir, "convnext_kernels", BUILT).write_text(json.dumps({"commit": commit()}) + "\n")


class BuildPy(build_py):
    """Write into a wheel what it was built from, with what, and why without compiled kernels."""

    def run(self) -> None:
        """Copy the sources, then write the file; an editable installation has its checkout instead."""
        super().run()
        if not self.editable_mode:
            built = {"commit": commit(), "python": platform.python_version(), "pure_python": PURE_REASON}
            Path(self.build_lib, "convnext_kernels", BUILT).write_text(json.dumps(built) + "\n")


class CMakeBuild(build_ext):
    """Run CMake once for all extensions; setuptools packs, and for an editable install copies, what it installs."""

    def run(self) -> None:
        """Compile, then let setuptools do the rest."""
        self.compiled = self._compile()
        super().run()

    def _compile(self) -> Path:
        import pybind11

        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        environment = os.environ | {"CXX": COMPILER}
        # CMake cannot change these two in a build folder, so a change starts afresh.
        stamp, key = build / "made_from.txt", f"{ROOT}\n{COMPILER}\n"
        if build.exists() and not (stamp.exists() and stamp.read_text() == key):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key)
        copy = stable_copy(Path(pybind11.__file__).parent, build / "pybind11")
        installed = build / "installed"
        shutil.rmtree(installed, ignore_errors=True)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        steps = (
            [
                *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={copy / 'share' / 'cmake' / 'pybind11'}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            [cmake, "--build", build, *([f"-j{self.parallel}"] if self.parallel else [])],
            [cmake, "--install", build, "--prefix", installed],
        )
        for step in steps:
            if subprocess.run(step, env=environment).returncode:
                raise CompileError(
                    f"cmake {step[1]} failed; its messages are above. CNK_CUDA=0 leaves the CUDA kernels out, "
                    "CNK_NATIVE=0 all compiled kernels."
                )
        return installed

    def build_extension(self, ext: Extension) -> None:
        """Take what CMake installed to where setuptools expects it; the CUDA extension is not always there."""
        target = Path(self.get_ext_fullpath(ext.name))
        source = self.compiled / Path(*ext.name.split(".")).with_name(target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.exists():
            shutil.copy2(source, target)
        elif ext.optional:
            target.unlink(missing_ok=True)
        else:
            raise CompileError(f"CMake installed no {source.name}")


# What setuptools is called for; an sdist and metadata need no compiler.
commands = set(sys.argv[1:])
compiles = commands & {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"}
COMPILER, PURE_REASON = choose_compiler() if compiles else ("", "")
EXTENSIONS = [
    Extension("convnext_kernels._native", sources=[]),
    Extension("convnext_kernels._native_cuda", sources=[], optional=True),
]
if "editable_wheel" in commands:  # what an earlier installation left in the tree would still be imported
    for ext in EXTENSIONS:
        Path(ROOT, *ext.name.split(".")).with_suffix(sysconfig.get_config_var("EXT_SUFFIX")).unlink(missing_ok=True)
setup(
    ext_modules=EXTENSIONS if COMPILER else [], cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "sdist": Sdist}
)
