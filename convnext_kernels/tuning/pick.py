"""The choice between candidates."""

from collections.abc import Sequence

from convnext_kernels.tuning.cost import Candidate, seconds
from convnext_kernels.tuning.gpus import Gpu


def pick(kernel: str, problem: tuple, candidates: Sequence[Candidate], gpu: Gpu) -> Candidate:
    """Return the candidate with the lowest predicted time; the first of equals."""
    return min(candidates, key=lambda c: sum(seconds(work, gpu) for work in c.launches))
