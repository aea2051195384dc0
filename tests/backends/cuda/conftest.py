"""How the host build of the CUDA kernels runs: thread order, the GPU it plans for, launches listed instead of run."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from convnext_kernels.backends.cuda import native


class Launch(NamedTuple):
    """What a launcher asks for."""

    symbol: str  # the kernel's mangled name
    grid: int
    threads: int
    shared_bytes: int
    params: bytes


@pytest.fixture
def host() -> Iterator[Callable[..., None]]:
    """``host(last_first=True, grid_limit=2, shared_bytes=65536)``: the order of a block's threads and the GPU."""

    def configure(last_first: bool = False, **device: int) -> None:
        native.extension().set_thread_order(last_first)
        native.extension().set_device(**device)

    yield configure
    configure()


@pytest.fixture
def recorded() -> Iterator[Callable[..., list[Launch]]]:
    """``launches = recorded(shared_bytes=65536)``: from now on kernels are not run but listed."""

    def start(**device: int) -> list[Launch]:
        launches: list[Launch] = []
        native.extension().set_device(**device)
        native.extension().set_recorder(lambda *what: launches.append(Launch(*what)))
        return launches

    yield start
    native.extension().set_recorder(None)
    native.extension().set_device()
