"""Options and fairness of the benchmarks: pytest benchmarks --benchmark-only [--quick]."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="one stage and batch 1 only, for a check in under two minutes"
    )


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    if "stage" in metafunc.fixturenames:
        stages = [(384, 14)] if quick else [(96, 56), (192, 28), (384, 14), (768, 7)]
        metafunc.parametrize("stage", stages, ids=lambda s: f"C{s[0]}-{s[1]}x{s[1]}")
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", [1] if quick else [1, 8], ids=lambda n: f"batch{n}")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
