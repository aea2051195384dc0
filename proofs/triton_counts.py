"""Count what the Triton kernels execute: PTX instructions per result, bytes, registers, spills.

Needs `triton_ptxemu` on the path, a Triton driver that executes the compiled PTX on the CPU; nothing is timed.
The counts are of PTX; the assembler translates PTX into other instructions.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from convnext_kernels import tuning
from convnext_kernels.calls import DwconvCall

BATCH = 128  # that plans are made for


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


@dataclass(frozen=True)
class Counts:
    """What was executed of the forward pass, of the input gradient (with a residual) or of the weight gradient."""

    what: str  # forward, dgrad or wgrad
    case: str
    plan: str
    per_32: float  # executed PTX instructions of a warp per 32 outputs, of all launches together
    mma: float  # the part of them that is products on tensor cores
    per_tap: float  # the same as `per_32`, divided by the taps inside the image, averaged over its pixels
    bytes: float  # unique ones of a pixel and channel
    spills: int  # bytes, the most of the launches
    launches: int

    def __str__(self) -> str:
        return f"{self.case} {self.what} ({self.plan})"

    @property
    def least_bytes(self) -> int:
        """An image is read and another one written; the residual is read too."""
        return 6 if self.what == "dgrad" else 4


def dwconv_counts(
    n: int, channels: int, size: int, side: int | tuple[int, int], arch: int, plan_channels: int = 0, named: str = ""
) -> Iterator[Counts]:
    """Execute the kernels of a bf16 convolution in channels_last on `n` samples.

    The plan is the one for BATCH samples of `plan_channels` (0: of `channels`), with `named` in its name.
    """
    from convnext_kernels.backends.triton import dwconv, dwconv_gradients
    from convnext_kernels.backends.triton.plans import dwconv_plan

    emulator, g = _emulator(), torch.Generator().manual_seed(0)
    form = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x, dy, residual = (torch.randn(n, channels, size, size, generator=g).to(**form) for _ in range(3))
    height, width = (side, side) if isinstance(side, int) else side
    weight = torch.randn(channels, 1, height, width, generator=g).to(torch.bfloat16)
    bias = torch.randn(channels, generator=g).to(torch.bfloat16)
    call = DwconvCall(x, weight, bias, (1, 1), 1, torch.bfloat16)
    runs = {
        "forward": lambda: dwconv.forward(call),
        "dgrad": lambda: dwconv.input_gradient(dy, call, residual),
        "wgrad": lambda: dwconv.parameter_gradients(dy, call, True, True),
    }
    pixels = n * size * size
    taps = n * dwconv_plan.taps_inside(size, height, 1) * dwconv_plan.taps_inside(size, width, 1)
    chosen = _planned_for(BATCH, plan_channels or channels, named)
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
        once = n / max(n, BATCH)
        of_batch = ("pack_kernel", "copies_kernel", "finish_kernel")
        shares = [once if launch["kernel"] in of_batch else 1.0 for launch in launches]
        total = sum(s * sum(launch["by_class"].values()) for s, launch in zip(shares, launches, strict=True))
        moved = sum(share * launch["dram_bytes"] for share, launch in zip(shares, launches, strict=True))
        # The copies are also read once for any number of samples.
        moved -= (1 - once) * sum(launch["dram_bytes"] for launch in launches if launch["kernel"] == "copies_kernel")
        yield Counts(
            what,
            f"dwconv {height}x{width} C{channels} {size}x{size} bf16 sm_{arch}",
            plans[-1].name,
            total * 32 / (pixels * channels),
            sum(launch["by_class"].get("mma", 0) for launch in launches) * 32 / (pixels * channels),
            total * 32 / (taps * channels),
            moved / (pixels * channels),
            max(launch["spill_bytes"] for launch in launches),
            len(launches),
        )
