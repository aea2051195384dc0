"""What CMake makes of the settings for the CUDA kernels: it configures, nothing is compiled."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import cuda_host

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("CNK_CUDA", "CNK_CUDA_ARCHITECTURES", "CUDACXX", "CUDAARCHS", "CUDAFLAGS", "NVCC_PREPEND_FLAGS")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")

pytestmark = pytest.mark.skipif(bool(cuda_host.missing_tools()), reason=f"missing: {cuda_host.missing_tools()}")


@pytest.fixture
def without_nvcc(tmp_path):
    """Environment in which no nvcc is found: PATH, with links to the other tools of nvcc's folder."""
    folders = []
    for number, folder in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not (Path(folder) / "nvcc").exists():
            folders.append(folder)
            continue
        links = tmp_path / f"tools{number}"
        links.mkdir()
        for tool in Path(folder).iterdir():
            if not tool.name.startswith("nvcc"):
                (links / tool.name).symlink_to(tool)
        folders.append(str(links))
    return {"PATH": os.pathsep.join(folders), "CUDA_PATH": ""}


@pytest.fixture
def configure(tmp_path):
    """``configure("-DCNK_CUDA=0", CNK_CUDA="1")``: options, environment; what CMake says. The folder stays the same."""
    import pybind11

    def run(*options: str, fails: bool = False, **environment: str) -> str:
        command = (
            cuda_host.tool("cmake"),
            *("-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={cuda_host.tool('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
        )
        clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())

    return run


def test_without_nvcc(configure, without_nvcc):
    assert "CUDA kernels: left out, no working nvcc" in configure(**without_nvcc)
    assert "CUDA kernels: left out, no working nvcc" in configure(CNK_CUDA="auto", **without_nvcc)
    said = configure(CNK_CUDA="1", fails=True, **without_nvcc)
    assert "CNK_CUDA=1, but no working nvcc" in said
    assert "CUDACXX=" in said


def test_an_unknown_value_is_an_error(configure):
    assert 'CNK_CUDA: expected auto, 0 or 1, got "maybe"' in configure(CNK_CUDA="maybe", fails=True)


def test_a_build_folder_follows_the_environment(configure, without_nvcc):
    """pip uses its folder again: what was asked for last time, and how it went, says nothing."""
    assert "CUDA kernels: not asked for" in configure(CNK_CUDA="0")
    assert "CUDA kernels: left out" in configure(**without_nvcc)
    assert "expected auto, 0 or 1" in configure(CNK_CUDA="maybe", fails=True)
    assert "CUDA kernels: not asked for" in configure(CNK_CUDA="0")


def test_an_extension_of_an_earlier_build_does_not_stay(configure, tmp_path):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    package = tmp_path / "convnext_kernels"
    package.mkdir()
    for name in ("_native_cuda", "_native_cuda_other"):
        (package / f"{name}{suffix}").touch()
    configure(CNK_CUDA="0")
    (tmp_path / "build" / f"_native{suffix}").touch()  # as if it were built
    subprocess.run([cuda_host.tool("cmake"), "--install", tmp_path / "build", "--prefix", tmp_path], check=True)
    assert {path.name for path in package.iterdir()} == {f"_native{suffix}", f"_native_cuda_other{suffix}"}


@needs_nvcc
def test_nvcc_found_later(configure, without_nvcc):
    assert "CUDA kernels: left out" in configure(**without_nvcc)
    assert "CUDA kernels: 80 90, PTX for 90" in configure(CNK_CUDA="1", CNK_CUDA_ARCHITECTURES="90 80")
    assert "CUDA kernels: 75 90a, PTX for 90a" in configure(CNK_CUDA="1", CNK_CUDA_ARCHITECTURES="75;90a")
    assert "CUDA kernels: 75 80 86 89 90" in configure(CNK_CUDA="")  # empty: as if it were not set


@needs_nvcc
def test_architectures_that_are_none(configure):
    for architectures in ("sm_90", "70 90", "native", "9.0"):
        said = configure(CNK_CUDA="1", CNK_CUDA_ARCHITECTURES=architectures, fails=True)
        assert "CNK_CUDA_ARCHITECTURES: expected compute capabilities from 75 on" in said
        assert f'got "{architectures}"' in said


@needs_nvcc
def test_options_of_cmake(configure):
    """The environment, which pip passes on, comes before -D."""
    assert "CUDA kernels: not asked for" in configure("-DCNK_CUDA=0")
    assert "CUDA kernels: 90, PTX for 90" in configure("-DCNK_CUDA=1", "-DCNK_CUDA_ARCHITECTURES=90")
    assert "CUDA kernels: not asked for" in configure("-DCNK_CUDA=1", CNK_CUDA="0")
