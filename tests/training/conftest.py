"""The examples that train, run in this process."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable]:
    """``example("train_digits")``: a module of that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def call(script) -> Callable[..., str]:
    """Run the test file's script; on one thread, because small tensors on a busy machine wait for the others."""

    def run(*arguments: object, code: int = 0) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        result = CliRunner().invoke(script.main, [str(a) for a in arguments])
        torch.set_num_threads(threads)
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    return run
