from dataclasses import replace

import pytest

from convnext_kernels.tuning import GPUS, Work, for_arch, for_device, seconds

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
