"""Choices that were measured on a GPU and ship with the package: ``measured_<GPU>.json`` in this folder, if it exists.

Such a file is one that `tune` wrote. Its choices serve all versions and all GPUs of that data sheet, so of its keys
only the kernel and the class of the problem count. Predictions are never stored: `pick` computes them.
"""

import functools
from pathlib import Path

from convnext_kernels.tuning.cache import read, shape_class
from convnext_kernels.tuning.gpus import Gpu

FOLDER = Path(__file__).parent


@functools.cache
def choices(gpu: str) -> dict[str, str]:
    """All choices for the GPU with this data sheet; none if nobody has measured it."""
    entries = read(FOLDER / f"measured_{gpu}.json")
    return {"|".join(key.split("|")[-2:]): name for key, name in entries.items()}


def lookup(kernel: str, problem: tuple, gpu: Gpu) -> str | None:
    """Name of the candidate that was the fastest on such a GPU, or None."""
    found = choices(gpu.name)
    return found.get(f"{kernel}|{shape_class(problem)}") if found else None
