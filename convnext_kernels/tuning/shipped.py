"""Choices that were measured on a GPU and ship with the package: ``measured_<GPU>.json`` in this folder, if it exists.

A file maps keys (`key`) to names of candidates under "choices". Predictions are never stored: `pick` computes them.
"""

import functools
import json
from pathlib import Path

from convnext_kernels.tuning.cache import shape_class
from convnext_kernels.tuning.gpus import Gpu

FOLDER = Path(__file__).parent


def key(kernel: str, problem: tuple) -> str:
    """The key of a choice."""
    return f"{kernel}|{shape_class(problem)}"


@functools.cache
def choices(gpu: str) -> dict[str, str]:
    """All choices for the GPU with this name; none if nobody has measured it."""
    try:
        return json.loads((FOLDER / f"measured_{gpu}.json").read_text(encoding="utf-8"))["choices"]
    except FileNotFoundError:
        return {}


def lookup(kernel: str, problem: tuple, gpu: Gpu) -> str | None:
    """Name of the candidate that was the fastest on such a GPU, or None."""
    found = choices(gpu.name)
    return found.get(key(kernel, problem)) if found else None
