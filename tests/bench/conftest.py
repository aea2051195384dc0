import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def program():
    """A program of benchmarks/ as a module: ``program("cpu_sweep")``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module
