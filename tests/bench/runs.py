"""Synthetic runs: the shape of real ones, with invented times."""

import dataclasses
import math
import random

from convnext_kernels.bench.cases import Case, cases
from convnext_kernels.bench.results import EAGER, FAILED, MODELS, OURS, UNAVAILABLE, WRONG, Record, Run, Times

GIGA = 1e9
PARAMETERS = 28_589_128  # of every model: the figures are invented
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
        "clock_mhz": {"cpu MHz": [2100.0, 2100.0]},
    }


def times(median: float, noise: float = 0.02, seed: int = 0, rounds: int = 5) -> Times:
    """Rounds of three calls around `median` milliseconds."""
    chance = random.Random(seed)
    return Times(tuple(tuple(median * (1 + noise * chance.uniform(-1, 1)) for _ in range(3)) for _ in range(rounds)))


def _flops_and_bytes(case: Case) -> tuple[int, int]:
    """About what bench/work.py counts."""
    element, triple = 4 if case.dtype in ("fp32", "tf32") else 2, 3 if case.direction == "training" else 1
    words = case.what.split()
    if case.group in MODELS:
        flops, numbers = 9e9 * (int(words[0 if case.group == "scaling" else 1]) / 224) ** 2 * case.batch, PARAMETERS
    else:
        c, pixels = int(words[-2][1:]), case.batch * int(words[-1].split("x")[0]) ** 2
        sides = words[0].removeprefix("K").removesuffix("s2").split("x") if case.group == "dwconv" else ["7"]
        taps = int(sides[0]) * int(sides[-1])
        dwconv = 2 * pixels * c * taps
        flops = {"layernorm": 0, "dwconv": dwconv, "mlp": 16 * pixels * c**2}.get(
            case.group, dwconv + 16 * pixels * c**2
        )
        numbers = 2 * pixels * c + (8 * c**2 if case.group in ("mlp", "block") else c * taps)
    return int(flops) * triple, numbers * element * triple


def _speed(case: Case, candidate: str, chance: random.Random) -> float:
    """Of a candidate, over eager's."""
    wide = {"forward": (0.93, 3.1), "training": (0.7, 1.15)}[case.direction]
    if case.group == "dwconv" and case.what.startswith("K31"):
        wide = (0.5, 14.0)
    return {EAGER: 1.0, OURS: chance.uniform(*wide), "eager, contiguous": chance.uniform(0.3, 0.9)}.get(
        candidate, chance.uniform(0.6, 1.7)
    )


def records(case: Case, device: str, chance: random.Random) -> list[Record]:
    """Records of every candidate in `case`."""
    flops, least = _flops_and_bytes(case)
    ceilings = (CUDA_CEILINGS if device == "cuda" else CEILINGS)["flops"]
    peak = ceilings["vector" if case.group == "dwconv" else case.dtype]
    milliseconds = 1e3 * (flops / peak * 3 + least / 20e9 / (100 if device == "cuda" else 1))
    model = case.group in MODELS
    common = {name: getattr(case, name) for name in ("group", "what", "batch", "dtype", "direction")}
    common |= {"case": case.name, "flops": flops, "bytes": least, "parameters": PARAMETERS if model else None}
    names = [EAGER, OURS, "eager, contiguous", "OpenVINO", "ONNX Runtime"]
    if case.group == "scaling":
        names = names[:2]
    if case.group == "block":
        names[3:3] = ["torch.compile", "torch.compile, max-autotune"]
    if case.group == "rival":
        names.remove(OURS)
    found = []
    for name in names:
        engine = name in ("OpenVINO", "ONNX Runtime")
        why = ""
        if engine and device == "cuda":
            why = "measured on CPUs only"
        elif engine and case.direction == "training":
            why = "inference only"
        elif name == "ONNX Runtime" and case.dtype == "bf16":
            why = "no bf16 kernels for CPUs"
        if why:
            found.append(Record(**common, candidate=name, status=UNAVAILABLE, reason=why))
            continue
        value = milliseconds / _speed(case, name, chance)
        found.append(
            Record(
                **common,
                candidate=name,
                status="ok",
                times=times(value, 0.03, chance.randrange(1000)),
                error=chance.uniform(0, 1e-3),
                allowed_error=1e-3,
                compute_share=flops / 190e9 / value * 1e3 if flops else None,
                memory_share=least / 20e9 / value * 1e3,
                saved_bytes=2 * least if case.direction == "training" else None,
                launches=3 if device == "cuda" else None,
                backend="cpu" if name == OURS else None,
            )
        )
    return found


def full_run(device: str = "cpu", seed: int = 0, **changes: object) -> Run:
    """All cases of `device`, without anything odd."""
    chance = random.Random(seed)
    run = Run(
        machine=machine(gpus=("Example H100, compute capability 9.0, 80 GiB",) if device == "cuda" else ()),
        conditions={
            "threads": 2,
            "pinned": [0, 1],
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
