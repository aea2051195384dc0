"""Bytes, launches and instructions of the Triton kernels, counted while their compiled PTX is executed on the CPU.

    python proofs/triton_executed.py [--check] [--update]

Needs the module `triton_ptxemu` on the path, a Triton driver that executes PTX without a GPU (not part of this
repository). Every figure is shown with its floor and its limit; none is a time.

Bytes are unique bytes: each 32-byte sector that a launch touches counts once for reading and once for writing, as if L2
were infinite and empty at the start of the launch.
"""

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType
from unittest import mock

import torch
import triton
import triton.language as tl
from checkout import RECORDS
from compile_only import compile_only
from cubin import analyse, loop_ffma
from figures import Figure, block_arguments, command
from triton_counts import Counts, dwconv_counts

from convnext_kernels import functional, tuning
from convnext_kernels.backends.triton.kernels.gelu import gelu
from convnext_kernels.calls import DwconvCall, MlpCall
from convnext_kernels.spec import MlpParameters
from convnext_kernels.tuning.pick import predicted

# (C, H = W, K or (KH, KW), samples); plans are those of a batch of 128, with that plan's images per thread if possible
DWCONV = (
    *((96, 28, 7, 4), (192, 28, 7, 4), (384, 14, 7, 4), (768, 7, 7, 16), (96, 28, 13, 4)),
    *((96, 14, 31, 12), (96, 28, 31, 4), (96, 28, (1, 11), 8), (96, 28, (11, 1), 8)),
)

# On tensor cores: H = W, K, the most instructions per 32 outputs (forward and dgrad, wgrad). They are a quarter of what
# one thread per output takes for K 31, half of it for K 13.
TOEPLITZ = ((28, 13, 90, 112), (28, 31, 152, 250), (56, 13, 112, 143), (56, 31, 259, 299))


# The tiles of a batch of 128. A few samples would get small tiles, which move other amounts of bytes.
LARGE_BATCH = {
    "fused": ("fused-m128", "fused-m64"),
    "gemm": ("gemm",),
    "mlp_expand": ("128x128",),
    "mlp_project": ("128x128",),
    "mlp_hidden_gradient": ("64x128-k32",),
    "mlp_input_gradient": ("64x",),
    "mlp_weight_gradient": ("64x64-p64-s2",),
    "mlp_data_gradient": ("m64-",),
    "mlp_recomputed_weight_gradient": ("h64-p16",),
}


def _large(kernel: str, problem: tuple, candidates: list, gpu: tuning.Gpu) -> tuning.Candidate | None:
    channels = problem.channels
    if kernel == "mlp_backward":
        from convnext_kernels.backends.triton.plans import mlp_gradient_plan

        side = 5376 // channels  # of ConvNeXt's stages
        problem = problem._replace(samples=128 * side**2 // problem.sample_pixels)
        whole = tuning.for_arch(gpu.arch)
        name = predicted(tuple(mlp_gradient_plan.backward_candidates(problem, whole)), whole).name
        return next(c for c in candidates if c.name == name)
    if kernel.startswith("mlp"):
        plan = "fused" if channels <= 256 and kernel == "mlp_forward" else "gemm"
        plan = kernel if kernel in LARGE_BATCH else plan
        names = [c.name for c in candidates]
        chosen = next((n for start in LARGE_BATCH[plan] for n in names if n.startswith(start)), None)
        return next((c for c in candidates if c.name == chosen), None)
    large = problem._replace(samples=128)
    if kernel == "dwconv_forward":
        from convnext_kernels.backends.triton.plans import dwconv_plan

        name = predicted(tuple(dwconv_plan.forward_candidates(large, gpu)), gpu).name
        return next((c for c in candidates if c.name == name), None)
    return None


def block_figures(arch: int) -> Iterator[Figure]:
    """Count launches and unique bytes of whole blocks, forward."""
    import triton_ptxemu as emulator

    for channels, size, n, grn in (
        (96, 28, 1, False),
        (192, 14, 2, False),
        (384, 14, 1, False),
        (768, 7, 4, False),
        (96, 14, 2, True),
        (384, 14, 1, True),
    ):
        arguments = block_arguments(n, channels, size, grn)
        pixels = n * size * size
        weights = 2 * (2 * 4 * channels**2 + 49 * channels)
        name = f"block C{channels} {size}x{size} {'V2' if grn else 'V1'} bf16 sm_{arch}"
        with emulator.emulated(arch) as launches, tuning.forced(_large), torch.no_grad():
            functional.convnext_block(**arguments, backend="triton")
        counted = list(launches)
        floor = (10 if channels <= 256 else 26) if not grn else (12 if channels <= 256 else 26)
        moved = (sum(s["dram_bytes"] for s in counted) - weights * (1.5 if grn and channels <= 256 else 1)) / (
            pixels * channels
        )
        limit = None if grn else 1.15 * floor
        yield Figure(f"{name}: bytes per pixel without the weights", moved, floor, limit, "C")
        most = 4 if grn else 2 if channels <= 256 else 3
        yield Figure(f"{name}: launches", len(counted), most, most, "")
        spilled = sum(s["spill_bytes"] for s in counted)
        yield Figure(f"{name}: spills", spilled, 0, 0, "bytes")


def weights_figures(arch: int) -> Iterator[Figure]:
    """Count the bytes of copies of pointwise weights: those that are written, and those of parameters as before."""
    import triton_ptxemu as emulator

    from convnext_kernels.backends.triton import weights

    def count(name: str, channels: int, size: int, most: float, write: Callable) -> Iterator[Figure]:
        for when, floor in (("changed", most), ("unchanged", 0)):
            with emulator.emulated(arch) as launches:
                write()
            moved = sum(launch["dram_bytes"] for launch in launches) / size
            what = f"{name} of C{channels} {when} sm_{arch}: bytes per weight"
            yield Figure(what, moved, floor, floor + 0.04, "")

    with mock.patch.object(weights, "kept", functools.partial(weights.kept, stream=0)):
        # under autocast both are rounded
        arguments = block_arguments(1, 384, 1, False, torch.float32)
        parameters = MlpParameters(*map(arguments.get, MlpParameters._fields))
        call = MlpCall(arguments["x"], None, parameters, None, 1e-6, 1e-6, "layer", "gelu", torch.bfloat16)
        yield from count("weights fp32 to bf16", 384, 8 * 384**2, 6, lambda: weights.matrices(call))
        for channels in (384, 768):
            arguments = block_arguments(1, channels, 1, False)
            p = MlpParameters(*map(arguments.get, MlpParameters._fields))
            fold = functools.partial(weights.folded, p, torch.bfloat16, True)
            yield from count("LayerNorm folded into W1, bf16,", channels, 4 * channels**2, 4, fold)


def whole_block_figures(arch: int) -> Iterator[Figure]:
    """Count bytes and instructions of the block in one kernel; the floor of the latter: multiply-adds and GELU."""
    import triton_ptxemu as emulator

    channels, size = 96, 16
    arguments = block_arguments(1, channels, size, False)

    def whole(kernel: str, _problem: tuple, candidates: list, _gpu: tuning.Gpu) -> tuning.Candidate | None:
        return next((c for c in candidates if kernel == "block_forward" and c.name.startswith("whole")), None)

    with emulator.emulated(arch) as launches, tuning.forced(whole), torch.no_grad():
        functional.convnext_block(**arguments, backend="triton")
    _, counted = launches  # the first one packs the weights
    name = f"block C{channels} {size}x{size} V1 bf16 sm_{arch}, one kernel"
    moved = counted["dram_bytes"] - 2 * 2 * 4 * channels**2 - 4 * 49 * channels
    yield Figure(f"{name}: bytes per pixel without the weights", moved / (size**2 * channels), 4, 4.2, "C")
    executed = counted["counters"]["warp_instructions"] * 32 / (size**2 * channels)
    yield Figure(f"{name}: PTX per channel of a pixel", executed, 49 + 4 * 12, None, "")
    yield Figure(f"{name}: spills", counted["spill_bytes"], 0, 0, "bytes")


def training_figures(arch: int) -> Iterator[Figure]:
    """Count unique bytes of a training step of a block, in bf16 and under autocast with an fp32 x and parameters.

    Bytes per pixel are the difference of two batches on a GPU of one multiprocessor: its partial sums are the same for
    both, and drop out with the weights.
    """
    from convnext_kernels.backends.triton import device

    small = dataclasses.replace(tuning.for_arch(arch), sms=1)
    for channels in (96, 192):
        moved = {}
        for autocast in (False, True):
            counts = []
            for n in (1, 3):
                dtype = torch.float32 if autocast else torch.bfloat16
                arguments = block_arguments(n, channels, 14, False, dtype)
                arguments = {name: value.requires_grad_() for name, value in arguments.items()}
                counts.append(_step_bytes(arch, arguments, autocast, device, small))
            moved[autocast] = (counts[1] - counts[0]) / (2 * 14 * 14 * channels)
        name = f"training step, block C{channels} 14x14 V1 sm_{arch}"
        # Forward 10, gradients of mlp as in GRADIENT_PLANS, of dwconv 10. With an fp32 stream eight passes take 2 more:
        # x and the residual are read, the result, a rounded x and dx written, and dout is read three times.
        floor = 32 if channels == 96 else 64
        yield Figure(f"{name} bf16: bytes per pixel", moved[False], floor, 1.03 * floor, "C")
        yield Figure(f"{name} autocast: bytes per pixel", moved[True], floor + 16, 1.03 * (floor + 16), "C")


# Plans of the bottleneck's gradients, and the bytes per pixel and channel that their formulas give
# (mlp_fused_backward.py) with the hidden computed again, and the most: V1, V2 with the sums of its tiles.
GRADIENT_PLANS = {"gemm": ((56, None), None), "fused": ((44, 45), (48, 53)), "recomputed": ((12, 13), None)}


def gradient_figures(arch: int) -> Iterator[Figure]:
    """Count unique bytes of the bottleneck's gradients, as `training_figures` does."""
    import triton_ptxemu as emulator

    from convnext_kernels.backends.triton import device

    small = dataclasses.replace(tuning.for_arch(arch), sms=1)
    for plan, ranges in GRADIENT_PLANS.items():

        def choose(
            kernel: str, problem: tuple, candidates: list, gpu: tuning.Gpu, plan: str = plan
        ) -> tuning.Candidate | None:
            found = next((c for c in candidates if c.name == plan), None)
            return found if kernel == "mlp_backward" else _large(kernel, problem, candidates, gpu)

        for grn, expected in zip((False, True), ranges, strict=True):
            for channels in (96, 192):
                if expected is None or (channels > 128 and plan == "recomputed"):
                    continue
                counts = []
                for n in (1, 3):
                    arguments = block_arguments(n, channels, 14, grn)
                    arguments = {k: v.requires_grad_() for k, v in arguments.items() if not k.startswith("dwconv")}
                    with (
                        tuning.forced(choose),
                        mock.patch.object(device, "gpu", return_value=small),
                    ):
                        with emulator.emulated(arch):
                            y = functional.inverted_bottleneck(**arguments, backend="triton", memory="min")
                        with emulator.emulated(arch) as launches:
                            y.backward(torch.randn_like(y))
                    counts.append(sum(launch["dram_bytes"] for launch in launches))
                moved = (counts[1] - counts[0]) / (2 * 14 * 14 * channels)
                name = f"gradients of mlp, plan {plan}, C{channels} 14x14 {'V2' if grn else 'V1'} bf16 sm_{arch}"
                yield Figure(f"{name}: bytes per pixel", moved, *expected, "C")


def _step_bytes(arch: int, arguments: dict, autocast: bool, device: ModuleType, gpu: tuning.Gpu) -> int:
    import triton_ptxemu as emulator

    with emulator.emulated(arch) as launches, tuning.forced(_large), mock.patch.object(device, "gpu", return_value=gpu):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = functional.convnext_block(**arguments, backend="triton", memory="min")
        y.backward(torch.randn_like(y))
    return sum(launch["dram_bytes"] for launch in launches)


def dwconv_figures(arch: int) -> Iterator[Figure]:
    """Count executed PTX instructions of the depthwise kernels."""
    for channels, size, side, n in DWCONV:
        # Of other kernels those with one thread per output: all of these have a number of columns in their names
        for row in dwconv_counts(n, channels, size, side, arch, named="" if side == 7 else "-q"):
            weights = row.what == "wgrad"
            if side == 7:
                # Reading and adding the residual takes 5 to 6 of dgrad's
                limit = 93 if weights else (42 + 6 * (row.what == "dgrad")) if size <= 7 else 85
                yield Figure(f"{row}: PTX per 32 outputs", row.per_32, 28 if size <= 7 else 49, limit, "")
            else:
                # Of one row or column the residual takes 0.25; 7x7 takes 1.52, 1.63 and 1.90
                limit = 1.6
                if not isinstance(side, int):
                    limit = {"forward": 1.52, "dgrad": 1.75, "wgrad": 1.9}[row.what]
                yield Figure(f"{row}: PTX per tap inside the image", row.per_tap, 1, limit, "")
            limit = 5 if row.what == "forward" and side == 7 else None
            packed = side not in (7, (1, 11), (11, 1))  # the weights, for large kernels
            yield from _common(row, limit)
            launches = 2 if weights or packed else 1  # partial sums
            yield Figure(f"{row}: launches", row.launches, 1, launches, "")


def toeplitz_figures(arch: int) -> Iterator[Figure]:
    """Count executed PTX instructions of large depthwise kernels on tensor cores; the floor are the products."""
    for size, side, most, most_of_weights in TOEPLITZ:
        # 16 samples fill the rows of an instruction; of 96 channels, so that there are not more partial sums than usual
        for row in dwconv_counts(16, 8, size, side, arch, plan_channels=96, named="toeplitz"):
            limit = most_of_weights if row.what == "wgrad" else most + 6 * (row.what == "dgrad")
            yield Figure(f"{row}: PTX per 32 outputs", row.per_32, row.mma, limit, "")
            yield from _common(row, 1.3 * row.least_bytes)


def _common(row: Counts, limit: float | None) -> Iterator[Figure]:
    yield Figure(f"{row}: bytes per pixel", row.bytes, row.least_bytes, limit, "C")
    yield Figure(f"{row}: spills", row.spills, 0, 0, "bytes")


@triton.jit
def _unary(x_ptr, y_ptr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, gelu(x) if GELU else x)


def compiled_figures(arch: int) -> list[Figure]:
    """Return figures that need no execution. Uses a new process, because Triton caches kernels with their driver."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_compiled_figures, arch).result()


def _compiled_figures(arch: int) -> list[Figure]:
    """Count the instructions of GELU, and the share of the depthwise loops that multiplies."""
    figures = []
    from convnext_kernels.backends.triton import dwconv

    vector = torch.empty(1024, device="meta")
    with compile_only(arch) as launches:
        for with_gelu in (False, True):
            _unary[(1,)](vector, vector, GELU=with_gelu, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    copy, full = (analyse(k.cubin, k.kernel, arch, k.warps, k.shared, 0).instructions for k in launches)
    figures.append(Figure(f"GELU sm_{arch}: SASS instructions an element", (full - copy) / 8, 8, 12, ""))
    x = torch.empty(128, 96, 28, 28, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(96, 1, 7, 7, dtype=torch.bfloat16, device="meta")
    with compile_only(arch) as launches:
        call = DwconvCall(x, weight, None, (1, 1), 1, x.dtype)
        dwconv.forward(call)
        dwconv.parameter_gradients(x, call, True, False)
    for launch in launches[:2]:
        what = f"dwconv 7x7 C96 28x28 bf16 sm_{arch} {launch.kernel}: share of the loop's SASS that is not FFMA"
        figures.append(Figure(what, 1 - loop_ffma(launch.cubin), 0, 0.3, ""))
    return figures


MAKERS = (
    compiled_figures,
    block_figures,
    weights_figures,
    whole_block_figures,
    training_figures,
    gradient_figures,
    dwconv_figures,
    toeplitz_figures,
)


TEXT = (
    "Written by `python proofs/triton_executed.py --update`: compiled by Triton, executed on a CPU, counted. "
    "Nothing here ran on a GPU and nothing is a time. Bytes are unique 32-byte sectors per launch."
)


if __name__ == "__main__":
    command(RECORDS / "triton_counts.md", "Triton kernels: what their executed PTX counts", TEXT, *MAKERS)
