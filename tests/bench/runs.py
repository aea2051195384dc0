"""Synthetic runs: the shape of real ones, with invented times."""

import dataclasses
import math
import random

from convnext_kernels.bench.cases import Case, cases
from convnext_kernels.bench.results import EAGER, FAILED, MODELS, OURS, UNAVAILABLE, WRONG, Record, Run, Times

GIGA = 1e9
CEILINGS = {
    "flops": {"fp32": 190 * GIGA, "bf16": 2100 * GIGA, "vector": 180 * GIGA},
    "memory": [
        {"level": "L2", "size": 4 * 2**20, "rate": 210 * GIGA},
        {"level": "L3", "size": 30 * 2**20, "rate": 58 * GIGA},
        {"level": "memory", "size": None, "rate": 21 * GIGA},
    ],
    "sources": {
        "fp32": "PyTorch's 1536x1536x1536 product",
        "bf16": "bf16 AMX tile products in registers",
        "vector": "fp32 multiply-adds in registers",
        "memory": "copies by all threads, bytes read plus bytes written",
    },
}
CUDA_CEILINGS = {
    "flops": {"fp32": 51e12, "tf32": 390e12, "bf16": 720e12, "fp16": 740e12, "vector": 51e12},
    "memory": [{"level": "memory", "size": None, "rate": 2.9e12}],
    "sources": {"memory": "PyTorch's copy of 512 MiB, bytes read plus bytes written"},
}


def machine(cpu: str = "Example Xeon 6 @ 2.1 GHz", gpus: tuple[str, ...] = (), torch: str = "2.14.1") -> dict:
    """What environment.collect() gives, with what a run adds."""
    return {
        "convnext_kernels": "0.1.0",
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64",
        "libraries": {"torch": torch, "triton": None, "openvino": "2026.1"},
        "backends": {
            "cpu": {"available": True, "reason": "", "description": "native C++ kernels, AMX"},
            "triton": {"available": False, "reason": "no <GPU> & no driver", "description": ""},
        },
        "cuda_extension": {"built": False, "reason": "no nvcc"},
        "cpu": {"name": cpu, "torch_capability": "AVX512"},
        "threads": {"torch": 2, "cores": 2},
        "gpus": list(gpus),
        "no_gpu_reason": "" if gpus else "no driver",
        "environment": {"OMP_NUM_THREADS": None},
        "commit": "0123456789ab",
    }


def times(median: float, noise: float = 0.02, seed: int = 0, rounds: int = 5) -> Times:
    """Rounds of three calls around `median` milliseconds."""
    chance = random.Random(seed)
    return Times(tuple(tuple(median * (1 + noise * chance.uniform(-1, 1)) for _ in range(3)) for _ in range(rounds)))


def records(case: Case, device: str, chance: random.Random) -> list[Record]:
    """Records of every candidate in `case`."""
    training, model = case.direction == "training", case.group in MODELS
    common = {name: getattr(case, name) for name in ("group", "what", "batch", "dtype", "direction")}
    common |= {"case": case.name, "flops": 0 if case.group == "layernorm" else case.batch * 10**9, "bytes": 10**7}
    compiled = ("torch.compile", "torch.compile, max-autotune") if case.group == "block" else ()
    engines = ("OpenVINO", "ONNX Runtime")
    names = [EAGER, OURS, "eager, contiguous", *compiled, *engines][: 2 if case.group == "scaling" else None]
    found = []
    for name in names:
        if name in engines and (device == "cuda" or training or (name, case.dtype) == ("ONNX Runtime", "bf16")):
            why = "no bf16 kernels for CPUs" if device == "cpu" and not training else "inference on CPUs only"
            found.append(Record(**common, candidate=name, status=UNAVAILABLE, reason=why))
        elif name != OURS or case.group != "rival":
            factor = 1 if name == EAGER else chance.uniform(0.6, 3) if name == OURS else chance.uniform(0.3, 1.7)
            measured = {
                "times": times(10 * case.batch / factor, 0.03, chance.randrange(1000)),
                "error": chance.uniform(0, 1e-3),
                "allowed_error": 1e-3,
                "compute_share": chance.random() if case.group != "layernorm" else None,
                "memory_share": chance.random(),
                "saved_bytes": 2 * 10**7 if training else None,
                "launches": 3 if device == "cuda" else None,
                "backend": "cpu" if name == OURS else None,
                "parameters": 28_589_128 if model else None,
            }
            found.append(Record(**common, candidate=name, status="ok", **measured))
    return found


def full_run(device: str = "cpu", seed: int = 0, **changes: object) -> Run:
    """All cases of `device`, without anything odd."""
    chance = random.Random(seed)
    run = Run(
        machine=machine(gpus=("Example H100, compute capability 9.0, 80 GiB",) if device == "cuda" else ()),
        conditions={
            "threads": 2,
            "allocator": "freed memory stays in the process (mallopt)",
            "idle": {"others": 0.01, "steal": 0.0},
            "warnings": [],
        },
        ceilings=CUDA_CEILINGS if device == "cuda" else CEILINGS,
        device=device,
        mode="full",
        created="2026-11-24T20:01:55+00:00",
        seconds=5321.0,
        complete=True,
        records=[record for case in cases(device) for record in records(case, device, chance)],
    )
    return dataclasses.replace(run, **changes)


def replace(run: Run, case: str, candidate: str, **changes: object) -> Run:
    """`run` with one record changed."""
    changed = [
        dataclasses.replace(r, **changes) if (r.case, r.candidate) == (case, candidate) else r for r in run.records
    ]
    assert changed != run.records
    return dataclasses.replace(run, records=changed)


def odd_run() -> Run:
    """A full run that met everything that can go wrong."""
    run = full_run(complete=False, ceilings={"flops": {"fp32": 190 * GIGA}})
    run.conditions["warnings"] = ["other processes use 34% of the machine", "threads are <not> pinned & drift"]
    nothing = {"times": None, "compute_share": None, "memory_share": None}
    wrong = {"status": WRONG, "reason": "error 3.2e-01 against fp64 exceeds the allowed 1.0e-03", "error": 0.32}
    run = replace(run, "block/V1-C96-56x56-b1-fp32-forward", OURS, **wrong, **nothing)
    nan = {"status": WRONG, "reason": "the result holds NaN", "error": math.nan}
    run = replace(run, "block/V2-C96-56x56-b8-bf16-forward", "torch.compile", **nan, **nothing)
    failed = {"status": FAILED, "reason": "RuntimeError: <script>alert('x')</script> & more", "error": None}
    run = replace(run, "dwconv/K31-C768-7x7-b8-bf16-forward", OURS, **failed, **nothing)
    run = replace(run, "layernorm/C96-56x56-b1-fp32-forward", EAGER, **failed, **nothing)
    absent = {"status": UNAVAILABLE, "reason": "this package serves <ConvNeXts> only", "error": None}
    return replace(run, "mlp/V1-C96-56x56-b1-fp32-forward", OURS, **absent, **nothing)
