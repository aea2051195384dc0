"""pytest benchmarks --benchmark-only [--quick | --full]: the cases of `convnext_kernels.bench`, on a GPU or the CPU.

pytest-benchmark times the calls, one candidate after the other, and its options keep their usual meaning. The
candidates of a case follow each other, each warmed up, with pinned threads and an allocator that keeps its memory.
`convnext-kernels bench` interleaves the candidates instead: on a machine whose speed changes, quote its figures.
"""

import pytest
import torch

from convnext_kernels.bench import measure
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mode(config):
    return QUICK if config.getoption("--quick") else FULL if config.getoption("--full") else STANDARD


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one stage and ConvNeXt-T at batch 1: two minutes")
    parser.addoption("--full", action="store_true", help="every case and every peer in it: hours")


def pytest_generate_tests(metafunc):
    if "candidate" in metafunc.fixturenames:
        session = measure.Session(DEVICE, _mode(metafunc.config))
        cases = select(session.mode, (), DEVICE)
        rows = [(case, candidate.name) for case in cases for candidate in session.wanted(case)]
        ids = [f"{case.name}-{name.replace(', ', '-').replace(' ', '-')}" for case, name in rows]
        metafunc.parametrize(("case", "candidate"), rows, ids=ids)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout(3600))  # compiling a model takes minutes


@pytest.fixture(scope="session")
def session(pytestconfig):
    found = measure.Session(DEVICE, _mode(pytestconfig))
    yield found
    found.close()


@pytest.fixture
def opened(case, session):
    """The open case: the tests of its candidates follow each other."""
    return session.open(case)
