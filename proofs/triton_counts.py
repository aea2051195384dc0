"""Count what the Triton kernels execute: PTX instructions per result, bytes, registers, spills.

Needs `triton_ptxemu` on the path, a Triton driver that executes the compiled PTX on the CPU; nothing is timed.
The counts are of PTX; the assembler translates PTX into other instructions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from convnext_kernels import tuning
from convnext_kernels.calls import DwconvCall


def _emulator() -> Any:
    import triton_ptxemu

    return triton_ptxemu


def _planned_for(batch: int) -> Any:
    """Choose as for `batch` samples, for any batch of the tensors.

    The number of partial sums is scaled, so that a thread has as much work as with the whole batch, if possible.
    """
    from convnext_kernels.backends.triton import dwconv_plan

    def choice(
        kernel: str, problem: Any, candidates: Sequence[tuning.Candidate], gpu: tuning.Gpu
    ) -> tuning.Candidate | None:
        if not isinstance(problem, dwconv_plan.Problem):
            return None
        if kernel == "dwconv_forward":
            wanted = list(dwconv_plan.forward_candidates(problem._replace(samples=batch), gpu))
        else:
            wanted = list(dwconv_plan.weight_candidates(problem._replace(samples=batch), gpu))
        with tuning.forced(lambda *_: None):  # what `pick` would do outside of this block
            chosen = tuning.pick(kernel, problem._replace(samples=batch), wanted, gpu)
        if "parts" not in chosen.config:
            return chosen
        # `finish_kernel` takes eight partial sums at a time, and its instructions are scaled in `dwconv_counts`
        parts = max(1, round(int(chosen.config["parts"]) * problem.samples / batch))  # type: ignore[call-overload]
        return dataclasses.replace(chosen, config={**chosen.config, "parts": parts, "planned": chosen.config["parts"]})

    return choice


def dwconv_counts(
    n: int,
    channels: int,
    size: int,
    kernel_size: int | tuple[int, int],
    arch: int,
    plan_batch: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.channels_last,
) -> list[dict[str, Any]]:
    """Return rows for the forward pass, the input gradient (with a residual) and the weight gradient.

    The plan is the one for `plan_batch` samples, executed on `n`. A row has:

    - `kernel` (the one with the most instructions) and `plan`
    - `per_32`: executed PTX instructions of a warp per 32 outputs, for all launches together
    - `per_tap`: the same divided by the taps inside the image, averaged over its pixels
    - `bytes_ratio`: unique bytes divided by those of reading one image and writing (or reading) another
    - `registers` and `spill_bytes`: the largest of the launches
    - `launches`
    """
    from convnext_kernels.backends.triton import dwconv, dwconv_plan

    emulator = _emulator()
    g = torch.Generator().manual_seed(0)

    def image() -> torch.Tensor:
        return torch.randn(n, channels, size, size, generator=g).to(dtype).contiguous(memory_format=memory_format)

    x, dy, residual = image(), image(), image()
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    weight = torch.randn(channels, 1, height, width, generator=g).to(dtype)
    bias = torch.randn(channels, generator=g).to(dtype)
    call = DwconvCall(x, weight, bias, (1, 1), 1, dtype)
    runs = {
        "forward": lambda: dwconv.forward(call),
        "dgrad": lambda: dwconv.input_gradient(dy, call, residual),
        "wgrad": lambda: dwconv.parameter_gradients(dy, call, True, True),
    }
    pixels = n * size * size
    taps = n * dwconv_plan.taps_inside(size, height, 1) * dwconv_plan.taps_inside(size, width, 1)
    chosen = _planned_for(plan_batch)
    rows = []
    for what, run in runs.items():
        plans: list[tuning.Candidate] = []

        def choice(*arguments: Any, plans: list[tuning.Candidate] = plans) -> tuning.Candidate | None:
            candidate = chosen(*arguments)
            plans.extend([candidate] if candidate else [])
            return candidate

        with emulator.emulated(arch, fast_fma=True) as launches, tuning.forced(choice):
            run()
        # The weights are packed once, and partial sums are added once, for any number of samples
        shares = [n / max(n, plan_batch) if launch["kernel"] == "pack_kernel" else 1.0 for launch in launches]
        turns = [1.0] * len(launches)
        if what == "wgrad":
            config: dict[str, Any] = dict(plans[-1].config)
            strips = -(-size // config["strip"])
            sums, planned = (-(-strips * config[name] // 8) for name in ("parts", "planned"))
            turns[-1] = planned / sums * n / max(n, plan_batch)
        instructions = [
            turn * share * sum(launch["by_class"].values())
            for turn, share, launch in zip(turns, shares, launches, strict=True)
        ]
        total = sum(instructions)
        rows.append(
            {
                "what": what,
                "kernel": launches[instructions.index(max(instructions))]["kernel"],
                "plan": plans[-1].name,
                "per_32": total * 32 / (pixels * channels),
                "per_tap": total * 32 / (taps * channels),
                "bytes_ratio": sum(share * launch["dram_bytes"] for share, launch in zip(shares, launches, strict=True))
                / (2 * pixels * channels * x.element_size()),
                "registers": max(launch["registers"] or 0 for launch in launches),
                "spill_bytes": max(launch["spill_bytes"] for launch in launches),
                "launches": len(launches),
            }
        )
    return rows
