"""The choices that ship with the package: a JSON file for each GPU, written by ``proofs/update_defaults.py``.

``basis`` says where they come from: "predicted" (by the cost model) or "measured".
"""

import functools
import json
from importlib import resources

from convnext_kernels.tuning.cache import shape_class
from convnext_kernels.tuning.gpus import Gpu

SHIPPED = ("A100", "H100", "L40S", "RTX4090", "B200")


def key(kernel: str, problem: tuple) -> str:
    """The key of a choice."""
    return f"{kernel}|{shape_class(problem)}"


@functools.cache
def _choices(gpu: str) -> dict[str, str]:
    file = resources.files(__name__) / f"{gpu}.json"
    return json.loads(file.read_text(encoding="utf-8"))["choices"] if file.is_file() else {}


def lookup(kernel: str, problem: tuple, gpu: Gpu) -> str | None:
    """Name of the candidate that is the default for this problem, or None."""
    choices = _choices(gpu.name)
    return choices.get(key(kernel, problem)) if choices else None
