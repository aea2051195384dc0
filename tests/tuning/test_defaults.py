import importlib
import json
from pathlib import Path

import pytest

from convnext_kernels.tuning import GPUS, defaults

PROOFS = Path(__file__).resolve().parents[2] / "proofs"


@pytest.mark.parametrize("name", defaults.SHIPPED)
def test_files_say_where_they_come_from(name):
    content = json.loads((Path(defaults.__file__).parent / f"{name}.json").read_text())
    assert content["gpu"] == name
    assert content["basis"] in ("predicted", "measured")
    assert content["choices"]
    assert defaults._choices(name) == content["choices"]


def test_every_gpu_is_known_and_others_have_no_defaults():
    assert set(defaults.SHIPPED) <= set(GPUS)
    assert defaults.lookup("mlp_forward", (8,), GPUS["RTX3090"]) is None
    assert defaults.lookup("no_such_kernel", (8,), GPUS["H100"]) is None


def test_predicted_defaults_are_current(monkeypatch):
    """After a change of plans or cost model: python proofs/update_defaults.py."""
    triton = pytest.importorskip("triton", minversion="3.4", reason="the launchers of the Triton backend are asked")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: the launchers plan for the interpreter")
    monkeypatch.syspath_prepend(str(PROOFS))
    script = importlib.import_module("update_defaults")
    for name in defaults.SHIPPED:
        file = script.FOLDER / f"{name}.json"
        assert script.measured(file) or file.read_text() == script.text(GPUS[name]), name
