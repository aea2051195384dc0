"""Fixtures: the backends and instruction sets of this machine, poisoned memory, subprocesses."""

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

# Workers share the cores (pytest -n): an OpenMP thread that waits must not take one from the other worker.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. It is chosen when they are imported, for
# the whole process; TRITON_INTERPRET=0 leaves them out, or to a driver that emulates a GPU (tests/backends/triton).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import cuda_host

# Without a GPU the CUDA kernels run on the CPU too, built for it once; a file named in the variable is taken instead.
if not torch.cuda.is_available() and cuda_host.VARIABLE not in os.environ and not cuda_host.missing_tools():
    os.environ[cuda_host.VARIABLE] = str(cuda_host.build())

import convnext_kernels
from convnext_kernels import dispatch
from tests.shapes import ISAS

ROOT = Path(__file__).resolve().parents[1]

# What was timed on this machine must not decide what the tests run.
_CACHE = tempfile.TemporaryDirectory(prefix="convnext_kernels_tests_")
os.environ["CONVNEXT_KERNELS_CACHE"] = _CACHE.name


def _backend_parameters(every_isa: bool) -> list:
    """One parameter per backend; the native one once per instruction set if `every_isa`."""
    parameters = []
    for name, status in convnext_kernels.list_backends().items():
        if not status.available:
            marks = pytest.mark.skip(reason=f"backend {name!r} is not available: {status.reason}")
            parameters.append(pytest.param((name, None), id=name, marks=marks))
        elif name == "cpu" and every_isa:
            from convnext_kernels.backends import cpu

            for isa in ISAS:
                missing = isa not in cpu.supported_isas()
                marks = [pytest.mark.skip(reason=f"this processor has no {isa}")] if missing else []
                parameters.append(pytest.param((name, isa), id=f"{name}-{isa}", marks=marks))
        else:
            parameters.append(pytest.param((name, None), id=name))
    return parameters


def pytest_addoption(parser: pytest.Parser) -> None:
    """The order in which the CUDA kernels' host build runs the threads of a block."""
    parser.addoption("--cuda-threads", choices=["first-last", "last-first"], default="first-last")


def pytest_xdist_auto_num_workers() -> int:
    """``pytest -n auto``: one worker a core, hyperthreads counted; at most 8, because every one collects all tests."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# What older versions of PyTorch warn of in their own code: 2.6 in inductor, 2.9 to 2.11 there and in forward-mode AD,
# 2.11 of Python 3.13.0.
OLD_WARNINGS = (
    "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning",
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Set the thread order for the whole run, and two threads for each of several workers, so that work is split."""
    for line in OLD_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    if hasattr(config, "workerinput"):
        torch.set_num_threads(2)
    from convnext_kernels.backends.cuda import native

    if native.on_host():
        native.extension().set_thread_order(config.getoption("--cuda-threads") == "last-first")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a test's rule (tests/shapes.py, `chosen`) leaves out of every run belongs to the extended tests."""
    for item in items:
        for mark in item.iter_markers("chosen"):
            (everyday,) = mark.args
            names = inspect.signature(everyday).parameters
            if not everyday(**{name: item.callspec.params[name] for name in names}):
                item.add_marker(pytest.mark.extended)


@pytest.fixture(params=_backend_parameters(every_isa=False))
def backend(request: pytest.FixtureRequest) -> str:
    """Name of each backend that runs here, for ``backend=``."""
    return request.param[0]


@pytest.fixture(params=_backend_parameters(every_isa=True))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same as `backend`, with the native one forced to each instruction set of this machine in turn."""
    name, isa = request.param
    if isa is None:
        context = nullcontext()
    else:
        from convnext_kernels.backends import cpu

        context = cpu.use_isa(isa)
    with context:
        yield name


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from one seed, without the user's settings, and leaves the thread count as it was."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an element nobody wrote cannot look right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code of other tests, whose number is limited."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a script in a fresh interpreter and return what it prints; it fails if the script does."""

    def run(script: str, **environment: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", cuda_host.VARIABLE)}
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**clean, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
