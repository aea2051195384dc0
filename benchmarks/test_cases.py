"""Every case of `convnext_kernels.bench.cases` with every candidate of `convnext_kernels.bench.candidates`."""

import dataclasses

import pytest
import torch

from convnext_kernels.bench.results import OK, UNAVAILABLE
from convnext_kernels.bench.timing import Times, interleave, settle

# With wrong numbers nothing is timed, and the fixture is not used.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")


def test_case(benchmark, opened, candidate):
    checked = opened.check(candidate)
    if checked.status == UNAVAILABLE:
        pytest.skip(checked.reason)
    assert checked.status == OK, checked.reason
    case, call, device = opened.case, opened.calls[candidate], opened.session.device
    training = case.trains
    benchmark.group = f"{case.group} {case.what}, batch {case.batch}, {case.dtype}, {case.direction}"

    def to_the_end():
        call()
        torch.cuda.synchronize()

    with opened.session.timing(), torch.enable_grad() if training else torch.inference_mode():
        interleave({candidate: call}, rounds=0, training=training, device=device)  # only the warm-up
        settle()
        benchmark(to_the_end if device == "cuda" else call)
    if benchmark.disabled:
        return
    milliseconds = tuple(seconds * 1e3 for seconds in benchmark.stats.stats.data)
    record = opened.add_times(candidate, Times((milliseconds,)))
    # pytest-benchmark stores the times.
    benchmark.extra_info.update(dataclasses.asdict(dataclasses.replace(record, times=None)))
