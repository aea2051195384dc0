from dataclasses import replace

import pytest

from convnext_kernels.tuning import (
    GPUS,
    Candidate,
    Work,
    cache,
    for_arch,
    for_device,
    forced,
    pick,
    remembered,
    seconds,
    shipped,
)

WORK = Work(dram_bytes=1e8, l2_bytes=3e8, tensor_flops=1e11, fp32_ops=1e9, programs=1056, ctas_per_sm=2)


@pytest.mark.parametrize("field", ["dram_bytes", "l2_bytes", "tensor_flops", "fp32_ops"])
def test_more_work_never_takes_less_time(field):
    gpu = GPUS["H100"]
    times = [seconds(replace(WORK, **{field: amount}), gpu) for amount in (0, 1e6, 1e8, 1e10, 1e12, 1e14)]
    assert times == sorted(times)
    assert times[-1] > times[0]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_data_sheets_are_consistent(gpu):
    assert GPUS[gpu.name] is gpu
    assert gpu.shared_bytes < gpu.shared_sm_bytes
    assert gpu.dram_gbs < gpu.l2_gbs
    assert gpu.half_tflops == pytest.approx(2 * gpu.tf32_tflops, rel=0.05)
    assert gpu.tf32_tflops >= gpu.fp32_tflops or gpu.arch in (86, 89, 120)


@pytest.mark.parametrize(
    ("device", "arch", "name"),
    [
        *(
            ("", arch, name)  # an architecture has a GPU that stands for it
            for arch, name in ((80, "A100"), (86, "A10"), (87, "A10"), (90, "H100"), (103, "B200"), (121, "RTX5090"))
        ),
        ("NVIDIA GeForce RTX 3090", 86, "RTX3090"),
        ("NVIDIA H200", 90, "H200"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100"),
        ("NVIDIA GeForce RTX 3080", 86, "A10"),
        ("Tesla T4", 75, "T4"),
        *(("AMD Instinct", arch, "MI300X") for arch in ("gfx942", "gfx942:sramecc+:xnack-")),
        *(("AMD Instinct", arch, "MI250X") for arch in ("gfx90a", "gfx1100")),
    ],
)
def test_a_device_is_known_by_its_name_or_architecture(device, arch, name):
    gpu = for_device(device, arch) if device else for_arch(arch)
    assert gpu.name == name
    assert 0 < seconds(WORK, gpu) < 1
    if device.startswith("AMD"):
        assert gpu.machine == f"{device} {arch.partition(':')[0]}", "timed choices are kept for the architecture"


GPU = GPUS["H100"]
SLOW = Candidate("slow", {}, (Work(dram_bytes=2e9, programs=10_000),))
FAST = Candidate("fast", {}, (Work(dram_bytes=1e9, programs=10_000),))
OTHER = Candidate("other", {}, (Work(dram_bytes=3e9, programs=10_000),))
CANDIDATES = (SLOW, FAST, OTHER)
PROBLEM = (8, 96)


@pytest.fixture
def measured_h100(tmp_path, monkeypatch):
    """A file as `tune` writes it on such a GPU, by another version."""
    entry = cache.key("k", PROBLEM, GPU).replace(cache.__version__, "0.0.1")
    cache.write(tmp_path / "measured_H100.json", {entry: "slow"})
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.choices.cache_clear()
    yield
    shipped.choices.cache_clear()


def test_the_cost_model_chooses_where_nothing_else_does():
    assert pick("k", PROBLEM, CANDIDATES, GPU) is FAST
    twin = Candidate("twin", {}, FAST.launches)
    assert pick("k", PROBLEM, (twin, FAST), GPU) is twin, "the first of equals"


def test_measurements_come_first(measured_h100, remember):
    """Shipped ones before the cost model, those of this machine before them, and forced choices before all."""
    assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
    assert pick("k", (6, 96), CANDIDATES, GPU) is SLOW  # of the same class
    assert pick("k", PROBLEM, CANDIDATES, GPUS["A100"]) is FAST
    assert pick("another", PROBLEM, CANDIDATES, GPU) is FAST
    remember("k", PROBLEM, GPU, "other")
    assert pick("k", PROBLEM, CANDIDATES, GPU) is OTHER
    with forced(lambda kernel, problem, candidates, gpu: candidates[0] if kernel == "k" else None):
        assert pick("k", PROBLEM, CANDIDATES, GPU) is SLOW
        assert pick("another", PROBLEM, CANDIDATES, GPU) is FAST


def test_what_is_remembered_gives_way_to_forced_and_to_timed_choices(remember):
    plan = remembered(lambda problem: pick("k", problem, CANDIDATES, GPU))
    assert plan(PROBLEM) is FAST
    with forced(lambda *_: SLOW):
        assert plan(PROBLEM) is SLOW
    assert plan(PROBLEM) is FAST
    remember("k", PROBLEM, GPU, "other")
    assert plan(PROBLEM) is OTHER


def test_a_handicap_must_be_made_up_for(remember):
    better = Candidate("better", {}, (Work(dram_bytes=0.9e9, programs=10_000),), handicap=1.2)
    assert pick("k", PROBLEM, (FAST, better), GPU) is FAST
    remember("k", PROBLEM, GPU, "better")
    assert pick("k", PROBLEM, (FAST, better), GPU) is better
