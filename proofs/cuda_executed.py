"""Instructions, bytes and launches of the CUDA kernels, counted while nvcc's PTX is executed on the CPU.

    python proofs/cuda_executed.py [--arch 90] [--check] [--update]

Needs nvcc, and the module `ptxemu` on the path, an emulator of PTX (not part of this repository). Every figure is shown
with its floor and its limit; none is a time. Launchers plan for a batch of 128; a few samples of it are executed, on
proportionally fewer multiprocessors. Bytes are unique bytes: each 32-byte sector that a launch touches counts once for
reading and once for writing.
"""

import os
from collections.abc import Iterator

import torch
from checkout import RECORDS
from figures import Figure, block_arguments, command

from tests import cuda_host

os.environ[cuda_host.VARIABLE] = os.environ.get(cuda_host.VARIABLE) or str(cuda_host.build())

from convnext_kernels import functional, tuning
from convnext_kernels.backends.cuda import dwconv
from convnext_kernels.calls import DwconvCall
from tests.backends.cuda import executed

BATCH = 128
TEXT = (
    "Written by `python proofs/cuda_executed.py --update`: compiled by nvcc, executed on a CPU, counted. Nothing here "
    f"ran on a GPU and nothing is a time. Planned for a batch of {BATCH}, executed for a few samples on proportionally "
    "fewer multiprocessors."
)
# (executed samples, C, H = W, K)
DWCONV = ((4, 96, 56, 7), (4, 192, 28, 7), (8, 384, 14, 7), (16, 768, 7, 7), (2, 96, 56, 13), (2, 96, 28, 31))
BF16 = torch.bfloat16


def _planned(arch: int, samples: int) -> int:
    """Return the number of multiprocessors that gives each as much work as the whole GPU has with BATCH samples."""
    return max(1, executed.DEVICES[arch][0] * samples // BATCH)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def _image(*shape: int) -> torch.Tensor:
    return _random(*shape).contiguous(memory_format=torch.channels_last)


def _moved(launches: list) -> int:
    return sum(launch.stats["gld_unique_bytes"] + launch.stats["gst_unique_bytes"] for launch in launches)


def _taps_inside(size: int, side: int) -> float:
    """Return the average number of taps inside the image per output."""
    inside = sum(min(size - 1, i + side // 2) - max(0, i - side // 2) + 1 for i in range(size)) / size
    return inside**2


def dwconv_figures(arch: int) -> Iterator[Figure]:
    """Count executed instructions and bytes of the depthwise kernels, bf16, channels_last."""
    for n, c, size, side in DWCONV:
        x, dy, weight, bias = _image(n, c, size, size), _image(n, c, size, size), _random(c, 1, side, side), _random(c)
        outputs = n * c * size * size
        taps = _taps_inside(size, side)
        convolution = DwconvCall(x, weight, bias, (1, 1), 1, BF16)
        calls = {
            "forward": lambda of=convolution: dwconv.forward(of),
            "input gradient": lambda dy=dy, of=convolution: dwconv.input_gradient(dy, of),
            "weight gradient": lambda dy=dy, of=convolution: dwconv.parameter_gradients(dy, of, True, True),
        }
        for name, call in calls.items():
            with executed.executed(arch, check=False, multiprocessors=_planned(arch, n)) as run:
                call()
            what = f"dwconv {side}x{side} C{c} {size}x{size} bf16 sm_{arch} {name}"
            instructions = sum(launch.stats["warp_instructions"] for launch in run.launches) / (outputs / 32)
            limit = 80 if side == 7 and name != "weight gradient" else None
            yield Figure(f"{what}: PTX per 32 outputs", instructions, side * side, limit, "")
            if side > 7:
                yield Figure(f"{what}: PTX per tap inside the image", instructions / taps, 1, None, "")
            limit = 1.25 * 4 if name != "weight gradient" else None
            moved = _moved(run.launches) - (2 * side * side * c if name != "weight gradient" else 0)
            yield Figure(f"{what}: bytes per pixel without the weights", moved / outputs, 4, limit, "C")
            yield Figure(f"{what}: launches", len(run.launches), 1, 2 if name == "weight gradient" else 1, "")


def block_figures(arch: int) -> Iterator[Figure]:
    """Count launches and unique bytes of whole blocks whose hidden stays on chip, forward, bf16."""
    for n, c, size, grn in ((1, 96, 28, False), (2, 192, 14, False), (2, 96, 14, True)):
        arguments, hidden = block_arguments(n, c, size, grn), 4 * c

        def fused(kernel: str, problem: tuple, candidates: list, gpu: tuning.Gpu) -> tuning.Candidate | None:
            return next((c for c in candidates if c.config.get("plan") == "fused"), None)

        with executed.executed(arch, check=False) as run, tuning.forced(fused), torch.no_grad():
            functional.convnext_block(**arguments, backend="cuda")
        weights = 2 * (2 * hidden * c + 49 * c)
        moved = (_moved(run.launches) - weights * (1.5 if grn else 1)) / (n * size * size * c)
        what = f"block C{c} {size}x{size} {'V2' if grn else 'V1'} bf16 sm_{arch}"
        yield Figure(f"{what}: bytes per pixel without the weights", moved, 12 if grn else 10, None, "C")
        yield Figure(f"{what}: launches", len(run.launches), 4 if grn else 2, 4 if grn else 2, "")


if __name__ == "__main__":
    title = "CUDA kernels: what their executed PTX counts"
    command(RECORDS / "cuda_counts.md", title, TEXT, dwconv_figures, block_figures, missing=executed.missing())
