"""Count what the Triton kernels execute: PTX instructions per result, bytes, registers, spills.

Needs `triton_ptxemu` on the path, a Triton driver that executes the compiled PTX on the CPU; nothing is timed.
The counts are of PTX; the assembler translates PTX into other instructions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from convnext_kernels import tuning
from convnext_kernels.calls import DwconvCall


def _emulator() -> Any:
    import triton_ptxemu

    return triton_ptxemu


def _planned_for(batch: int, channels: int, named: str) -> Any:
    """Choose as for `batch` samples of `channels`, for any tensors, among the candidates with `named` in their names.

    The number of partial sums is scaled, so that a thread has as much work as with the whole batch, if possible.
    """
    from convnext_kernels.backends.triton.plans import dwconv_plan

    def choice(
        kernel: str, problem: Any, candidates: Sequence[tuning.Candidate], gpu: tuning.Gpu
    ) -> tuning.Candidate | None:
        if not isinstance(problem, dwconv_plan.Problem):
            return None
        whole = problem._replace(samples=batch, channels=channels)
        forward = kernel == "dwconv_forward"
        wanted = (dwconv_plan.forward_candidates if forward else dwconv_plan.weight_candidates)(whole, gpu)
        wanted = [c for c in wanted if named in c.name]
        with tuning.forced(lambda *_: None):  # what `pick` would do outside of this block
            chosen = tuning.pick(kernel, whole, wanted, gpu)
        if "parts" not in chosen.config:
            return chosen
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
    plan_channels: int = 0,
    named: str = "",
) -> list[dict[str, Any]]:
    """Return rows for the forward pass, the input gradient (with a residual) and the weight gradient.

    The plan is the one for `plan_batch` samples of `plan_channels` (0: of `channels`), with `named` in its name. It is
    executed on `n` samples. A row has:

    - `kernel` (the one with the most instructions) and `plan`
    - `per_32`: executed PTX instructions of a warp per 32 outputs, for all launches together
    - `mma`: the part of them that is products on tensor cores
    - `per_tap`: the same as divided by the taps inside the image, averaged over its pixels
    - `bytes_ratio`: unique bytes divided by those of reading one image and writing (or reading) another
    - `registers` and `spill_bytes`: the largest of the launches
    - `launches`
    """
    from convnext_kernels.backends.triton import dwconv, dwconv_gradients
    from convnext_kernels.backends.triton.plans import dwconv_plan

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
    chosen = _planned_for(plan_batch, plan_channels or channels, named)
    rows = []
    for what, run in runs.items():
        plans: list[tuning.Candidate] = []

        def choice(*arguments: Any, plans: list[tuning.Candidate] = plans) -> tuning.Candidate | None:
            candidate = chosen(*arguments)
            plans.extend([candidate] if candidate else [])
            return candidate

        def sums(parts: int, *_: Any, plans: list[tuning.Candidate] = plans) -> torch.Tensor:
            """As many partial sums as the plan has for the whole batch; those of other samples are 0."""
            config: dict[str, Any] = dict(plans[-1].config)
            return torch.zeros(parts // config["parts"] * config["planned"], height * width + 1, channels)

        with (
            emulator.emulated(arch, fast_fma=True) as launches,
            tuning.forced(choice),
            mock.patch.object(dwconv_gradients, "_sums", sums),
        ):
            run()
        # The weights are packed or copied once, and partial sums are added once, for any number of samples
        once = n / max(n, plan_batch)
        of_batch = ("pack_kernel", "copies_kernel", "finish_kernel")
        shares = [once if launch["kernel"] in of_batch else 1.0 for launch in launches]
        instructions = [
            share * sum(launch["by_class"].values()) for share, launch in zip(shares, launches, strict=True)
        ]
        total = sum(instructions)
        moved = sum(share * launch["dram_bytes"] for share, launch in zip(shares, launches, strict=True))
        # The copies are also read once for any number of samples.
        moved -= (1 - once) * sum(launch["dram_bytes"] for launch in launches if launch["kernel"] == "copies_kernel")
        rows.append(
            {
                "what": what,
                "kernel": launches[instructions.index(max(instructions))]["kernel"],
                "plan": plans[-1].name,
                "per_32": total * 32 / (pixels * channels),
                "per_tap": total * 32 / (taps * channels),
                "mma": sum(launch["by_class"].get("mma", 0) for launch in launches) * 32 / (pixels * channels),
                "bytes_ratio": moved / (2 * pixels * channels * x.element_size()),
                "registers": max(launch["registers"] or 0 for launch in launches),
                "spill_bytes": max(launch["spill_bytes"] for launch in launches),
                "launches": len(launches),
            }
        )
    return rows
