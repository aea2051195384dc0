from dataclasses import replace

import pytest

from convnext_kernels.tuning import GPUS, Work, for_arch, for_device, named, seconds
from convnext_kernels.tuning.cost import LAUNCH_SECONDS

WORK = Work(dram_bytes=1e8, l2_bytes=3e8, tensor_flops=1e11, fp32_ops=1e9, programs=1056, ctas_per_sm=2)
GPU = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)


@GPU
@pytest.mark.parametrize("field", ["dram_bytes", "l2_bytes", "tensor_flops", "fp32_ops"])
def test_more_work_never_takes_less_time(gpu, field):
    times = [seconds(replace(WORK, **{field: amount}), gpu) for amount in (0, 1e6, 1e8, 1e10, 1e12, 1e14)]
    assert times == sorted(times)
    assert times[-1] > times[0]


@GPU
def test_more_resident_programs_never_cost(gpu):
    times = [seconds(replace(WORK, ctas_per_sm=n), gpu) for n in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)


@GPU
@pytest.mark.parametrize("per_sm", [1, 2, 5])
def test_a_last_wave_of_one_program_costs(gpu, per_sm):
    """The same work in one program more than fills the multiprocessors evenly."""
    full = replace(WORK, programs=gpu.sms * per_sm, ctas_per_sm=8, dram_bytes=0)
    assert seconds(replace(full, programs=full.programs + 1), gpu) > seconds(full, gpu)


@GPU
def test_a_launch_costs_anyhow(gpu):
    assert seconds(Work(), gpu) == LAUNCH_SECONDS
    assert seconds(Work(dram_bytes=1e9, programs=0), gpu) == LAUNCH_SECONDS


@GPU
def test_no_time_is_below_that_of_the_peaks(gpu):
    assert seconds(WORK, gpu) > max(
        WORK.dram_bytes / gpu.dram_gbs / 1e9,
        WORK.l2_bytes / gpu.l2_gbs / 1e9,
        WORK.tensor_flops / gpu.half_tflops / 1e12,
        WORK.fp32_ops / (gpu.fp32_tflops / 2) / 1e12,
    )


def test_tf32_runs_at_its_own_rate():
    work = Work(tensor_flops=1e13, programs=13200, ctas_per_sm=2)
    assert seconds(replace(work, tf32=True), GPUS["H100"]) == pytest.approx(2 * seconds(work, GPUS["H100"]), rel=1e-2)


def test_half_the_multiprocessors_fill_the_bus_but_not_the_tensor_cores():
    gpu = GPUS["H100"]
    copy = Work(dram_bytes=1e9, programs=gpu.sms // 2, warps=8)
    assert seconds(copy, gpu) == seconds(replace(copy, programs=gpu.sms), gpu)
    product = Work(tensor_flops=1e13, programs=gpu.sms // 2, warps=8)
    assert seconds(product, gpu) > 1.9 * seconds(replace(product, programs=gpu.sms), gpu)


@GPU
def test_data_sheets_are_consistent(gpu):
    assert GPUS[gpu.name] is gpu
    assert gpu.shared_bytes < gpu.shared_sm_bytes
    assert gpu.dram_gbs < gpu.l2_gbs
    assert gpu.half_tflops == pytest.approx(2 * gpu.tf32_tflops, rel=0.05)
    assert gpu.tf32_tflops >= gpu.fp32_tflops or gpu.arch in (86, 89, 120)


@pytest.mark.parametrize(
    ("arch", "name"),
    [(80, "A100"), (86, "A10"), (87, "A10"), (90, "H100"), (103, "B200"), (121, "RTX5090"), (75, "T4")],
)
def test_an_architecture_has_a_gpu_that_stands_for_it(arch, name):
    assert for_arch(arch).name == name


@pytest.mark.parametrize(
    ("device", "arch", "name"),
    [
        ("NVIDIA GeForce RTX 3090", 86, "RTX3090"),
        ("NVIDIA H200", 90, "H200"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100"),
        ("NVIDIA GeForce RTX 3080", 86, "A10"),
        ("Tesla T4", 75, "T4"),
    ],
)
def test_a_device_is_known_by_its_name(device, arch, name):
    assert for_device(device, arch).name == name


@pytest.mark.parametrize(
    ("arch", "name"),
    [("gfx942", "MI300X"), ("gfx942:sramecc+:xnack-", "MI300X"), ("gfx90a", "MI250X"), ("gfx1100", "MI250X")],
)
def test_gpus_of_amd(arch, name):
    gpu = for_device("AMD Instinct", arch)
    assert gpu.name == name
    assert gpu.machine == f"AMD Instinct {arch.partition(':')[0]}", "timed choices are kept for the architecture"
    assert gpu.dram_gbs < gpu.l2_gbs
    assert gpu.fp32_tflops < gpu.tf32_tflops < gpu.half_tflops
    assert 0 < seconds(WORK, gpu) < 1


@pytest.mark.parametrize("name", ["H100", "h100", "NVIDIA H100", " nvidia-h100 "])
def test_names_are_taken_as_people_write_them(name):
    assert named(name) is GPUS["H100"]
    assert named("GeForce RTX 4090") is GPUS["RTX4090"]


def test_an_unknown_name_gets_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown GPU 'V100', expected one of A100, A10, .*RTX5090"):
        named("V100")
