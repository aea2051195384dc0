"""The settings of the build: what CMake makes of those for the CUDA kernels, and setup.py of a missing compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_host

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("CNK_CUDA", "CNK_CUDA_ARCHITECTURES", "CUDACXX", "CUDAARCHS", "CUDAFLAGS", "NVCC_PREPEND_FLAGS")

pytestmark = [
    pytest.mark.extended,  # CMake configures twenty times; the wheel of every run is built with its defaults
    pytest.mark.skipif(bool(cuda_host.missing_tools()), reason=f"missing: {cuda_host.missing_tools()}"),
]


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
    return {"PATH": os.pathsep.join(folders), "CUDA_PATH": "", "CNK_CUDA_ARCHITECTURES": "90"}


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


def test_wrong_values(configure):
    assert 'CNK_CUDA: expected auto, 0 or 1, got "maybe"' in configure(CNK_CUDA="maybe", fails=True)
    for architectures in ("sm_90", "70 90", "native", "all 90") if shutil.which("nvcc") else ():
        said = configure(CNK_CUDA="1", CNK_CUDA_ARCHITECTURES=architectures, fails=True)
        assert 'CNK_CUDA_ARCHITECTURES: expected "all" or compute capabilities from 75 on' in said
        assert f'got "{architectures}"' in said


def test_a_build_folder_follows_the_environment(configure, without_nvcc):
    """pip uses its folder again: what was asked for last time, and how it went, says nothing."""
    assert "CUDA kernels: skipped, no working nvcc" in configure(**without_nvcc)
    said = configure(CNK_CUDA="1", fails=True, **without_nvcc)
    assert "CNK_CUDA=1, but no working nvcc" in said
    assert "CUDACXX=" in said
    if not shutil.which("nvcc"):
        return
    assert "CUDA kernels: 80 90, PTX for 90" in configure(CNK_CUDA_ARCHITECTURES="90 80")
    assert "CUDA kernels: skipped, CNK_CUDA=0" in configure(CNK_CUDA="0")
    assert "expected auto, 0 or 1" in configure(CNK_CUDA="maybe", fails=True)
    assert "CUDA kernels: 75 80 86 89 90" in configure(CNK_CUDA_ARCHITECTURES="all")
