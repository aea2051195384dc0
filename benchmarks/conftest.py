"""pytest benchmarks --benchmark-only [--quick | --full] [--device cpu|cuda]: the cases of `convnext_kernels.bench`.

pytest-benchmark calls one function many times and then the next; on a machine whose speed changes, that compares
moments, not candidates. So each case is measured once, all candidates interleaved (`bench.measure`), and every
candidate's own test replays the measured times to pytest-benchmark on a clock that stands still in between: its
statistics, groups, files and comparisons work as usual.
"""

import itertools

import pytest
import torch

from convnext_kernels import environment
from convnext_kernels.bench import ceilings, conditions, measure
from convnext_kernels.bench.cases import FULL, QUICK, STANDARD, select
from convnext_kernels.bench.results import EAGER, FAILED, OK, OURS, UNAVAILABLE, Record, Run, best_peer, ratio


class Replay:
    """A timer for pytest-benchmark, and the function it times: each call takes the next of the measured times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = itertools.repeat(0.0)

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.now += next(self.seconds)


REPLAY = Replay()
SESSION = pytest.StashKey[measure.Session]()
RUN = pytest.StashKey[Run]()


def _mode(config):
    return QUICK if config.getoption("--quick") else FULL if config.getoption("--full") else STANDARD


def _device(config):
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one stage and ConvNeXt-T at batch 1: under two minutes")
    parser.addoption("--full", action="store_true", help="every case and every peer in it, and more rounds: hours")
    parser.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where PyTorch can use it, else cpu")


def pytest_configure(config):
    if config.getoption("--quick") and config.getoption("--full"):
        raise pytest.UsageError("--quick and --full exclude each other")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: {environment.gpus()[1]}")


def pytest_generate_tests(metafunc):
    if "candidate" in metafunc.fixturenames:
        mode, device = _mode(metafunc.config), _device(metafunc.config)
        session = measure.Session(device, mode, {})
        rows = [(case, c.name) for case in select(mode, (), device) for c in session.wanted(case)]
        ids = [f"{case.name}-{name.replace(', ', '-').replace(' ', '-')}" for case, name in rows]
        metafunc.parametrize(("case", "candidate"), rows, ids=ids)


def pytest_collection_modifyitems(items):
    for item in items:
        # One case measures all of its candidates in the first one's test; compiling a model takes minutes.
        item.add_marker(pytest.mark.timeout(3600))
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture(scope="session")
def session(pytestconfig):
    device, mode = _device(pytestconfig), _mode(pytestconfig)
    rates = ceilings.measure(device)
    pytestconfig.stash[SESSION] = measure.Session(device, mode, rates)
    pytestconfig.stash[RUN] = Run(environment.collect(), conditions.collect(device), rates, device, mode, "")
    return pytestconfig.stash[SESSION]


@pytest.fixture(scope="session")
def measured(session):
    """Records of a case by candidate, measured when first asked for."""
    known: dict[str, dict[str, Record]] = {}

    def of(case):
        if case.name not in known:
            known.clear()  # the tests of a case stand next to each other
            known[case.name] = {record.candidate: record for record in session.measure(case)}
        return known[case.name]

    return of


@pytest.fixture
def report(benchmark, measured):
    """Give one candidate's measured times, and all that belongs to them, to pytest-benchmark."""

    def give(case, candidate):
        records = measured(case)
        record = records[candidate]
        if record.status == UNAVAILABLE:
            pytest.skip(record.reason)
        assert record.status != FAILED, record.reason
        assert record.status == OK, f"no speed is reported for wrong numbers: {record.reason}"
        peer = records.get(EAGER) if candidate != OURS else best_peer(records)
        against = ratio(records, peer.candidate if candidate == OURS and peer else candidate)
        benchmark.group = f"{case.group} {case.what}, batch {case.batch}, {case.dtype}, {case.direction}"
        benchmark.extra_info.update(
            candidate=candidate,
            flops=record.flops,
            bytes=record.bytes,
            gflops=record.gflops,
            gbytes=record.gbytes,
            compute_share=record.compute_share,
            memory_share=record.memory_share,
            error=record.error,
            allowed_error=record.allowed_error,
            spread=record.times.spread,
            launches=record.launches,
            saved_bytes=record.saved_bytes,
            images_per_second=record.images_per_second,
            parameters=record.parameters,
            backend=record.backend,
            peer=peer.candidate if peer and candidate == OURS else None,
            ours_faster_by=against and against.value,
        )
        calls = [call / 1e3 for calls in record.times.rounds for call in calls]
        REPLAY.seconds = itertools.chain(calls, itertools.repeat(calls[-1]))
        benchmark.pedantic(REPLAY.call, rounds=len(calls), iterations=1)

    return give


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["convnext_kernels"] = environment.collect() | {"commit": environment.commit()}
    if RUN in config.stash:
        machine_info["conditions"] = config.stash[RUN].conditions
        machine_info["ceilings"] = config.stash[RUN].ceilings


def pytest_terminal_summary(terminalreporter, config):
    if RUN in config.stash:
        conditions_ = config.stash[RUN].conditions
        lines = conditions_["warnings"] + config.stash[SESSION].course.warnings()
        terminalreporter.section("conditions of the benchmarks")
        terminalreporter.line(f"threads: {conditions_['threads']}, pinning: {conditions_['pinning']}")
        for line in lines or ["nothing speaks against these figures"]:
            terminalreporter.line(f"warning: {line}" if lines else line)
