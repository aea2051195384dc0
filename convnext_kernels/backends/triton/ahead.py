"""Compiling kernels ahead of their first launch, in several processes: they find each other's work in Triton's cache.

A process compiles for the GPU that it is told, with a driver that knows nothing else, so it uses no GPU.

    python -m convnext_kernels.backends.triton.ahead      # reads (target, units) from stdin, pickled
"""

import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as drivers

from convnext_kernels.backends.gpu.prepared import Program


class Unit(NamedTuple):
    """What one kernel is compiled for."""

    module: str
    kernel: str
    arguments: tuple  # in order; a dtype for a tensor
    options: tuple[tuple[str, Any], ...]


class TargetDriver(DriverBase):
    """A GPU that kernels are compiled for; there is nothing to launch on."""

    def __init__(self, target: GPUTarget, device: str = "meta") -> None:
        self.target, self.device = target, torch.device(device)

    @staticmethod
    def is_active() -> bool:
        """It is only used where it is set."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """As for a real GPU."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return self.device

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Nothing: there is one."""

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream."""
        return 0

    def get_device_interface(self) -> Any:
        """PyTorch's module for the device."""
        return torch.cpu

    def get_benchmarker(self) -> Any:
        """Raises RuntimeError: nothing runs."""
        raise RuntimeError("this driver runs no kernels, so it cannot time them")


def units(programs: Iterable[Program]) -> list[Unit]:
    """What the launches of `programs` are compiled for, each once."""
    found: dict[Unit, None] = {}
    for program in programs:
        for launch in program.launches:
            function = launch.kernel.fn
            options = tuple(sorted(launch.options.items()))
            found[Unit(function.__module__, function.__name__, launch.compiled_for, options)] = None
    return list(found)


def compile_all(wanted: list[Unit], end: float, processes: int | None = None) -> None:
    """Compile in as many processes as there are cores, until `end` (`time.monotonic`) at the latest.

    A kernel that does not compile is left out: its launch will raise the error.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes or cores, len(wanted))
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    target = drivers.active.get_current_target()
    running = []
    try:
        for i in range(processes):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            )
            running.append(process)
            process.stdin.write(pickle.dumps((target, wanted[i::processes])))
            process.stdin.close()
        for process in running:
            process.wait(None if end == float("inf") else max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, OSError):
        pass  # what is missing is compiled at its first launch, which reports its errors
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    """Compile what stdin says."""
    target, wanted = pickle.load(sys.stdin.buffer)
    drivers.set_active(TargetDriver(target))
    for unit in wanted:
        kernel = getattr(importlib.import_module(unit.module), unit.kernel)
        try:
            kernel.warmup(*unit.arguments, grid=(1,), **dict(unit.options))
        except Exception as error:
            print(f"{unit.kernel}: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
