"""The choice of plan and tiles for the inverted bottleneck's gradients, as in mlp_plan.py for the forward pass."""

import functools
from collections.abc import Callable, Iterator, Sequence

from convnext_kernels import tuning
from convnext_kernels.backends.gpu.mlp_plan import HANDICAP, Problem, pointwise, product_by_library, response_work
from convnext_kernels.backends.triton.plans.mlp_plan import (
    LIBRARY,
    LIBRARY_HANDICAP,
    TF32_TILES,
    TRITON_SHARE,
    described,
    ours,
    pieces,
    rounded_batch,
    tile_config,
    tile_name,
    tile_product,
)
from convnext_kernels.tuning import Candidate, Work
from convnext_kernels.tuning.cost import cublas_product

FUSED_GRADIENT_CHANNELS = 192  # in the backward pass
GELU_BWD_OPS = 26  # as mlp_plan.GELU_OPS
NORM_BWD_OPS = 30  # of a row's element in `mlp_data_gradient_kernel`: the norm, dz and the norm's backward
# The products of a step and the activation between them wait for one another, with one or two programs on a
# multiprocessor; the model has them at the same time.
RECOMPUTED_HANDICAP = 1.3
TF32_HIDDEN_TILES = ((64, 64, 32, 4, 2), (64, 128, 32, 8, 2))
TF32_INPUT_TILES = ((64, 64, 1, 32, 4, 2), (128, 128, 1, 32, 8, 2))


def whole_row_channels(arch: int) -> int:
    """The longest row that fits in registers beside the accumulators, for LayerNorm's backward; longer rows spill."""
    return 192 if arch in (80, 90) else 128


# (BM, BN, BK, warps, stages)
HIDDEN_TILES = (
    *((64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (64, 64, 64, 4, 3), (64, 128, 64, 8, 2), (128, 64, 64, 8, 2)),
    (128, 128, 32, 8, 3),
)
# For rows in several programs: (BM, BC, PIECES, BK, warps, stages).
INPUT_TILES = ((64, 64, 2, 32, 8, 2), (64, 64, 1, 64, 4, 4), (128, 128, 1, 64, 8, 2), (128, 64, 2, 64, 8, 3))
# (BM, BN, BP, warps, stages)
WEIGHT_TILES = ((64, 64, 64, 4, 2), (64, 64, 64, 4, 4), (128, 128, 64, 8, 2))


def hidden_gradient_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the gradient of the hidden's pre-activation, and the hidden."""
    wide, recomputed = p.hidden * p.compute_itemsize, not p.keeps_hidden
    weights = float(p.channels * wide)
    read = p.channels * p.stream_itemsize + (p.channels * p.compute_itemsize if recomputed else wide)
    for sizes in TF32_HIDDEN_TILES if p.rounded else HIDDEN_TILES:
        # Two accumulators of 128 x 128 spill 32 bytes on sm_120 and 40 on sm_80, beside an fp32 gradient 40 on sm_100,
        # too; V2's epilogue is longer.
        archs = (90, 100, 103) if p.stream_itemsize == 2 else (90,)
        if not p.rounded and sizes[:2] == (128, 128) and (p.grn or gpu.arch not in archs):
            continue
        if p.grn and sizes[0] == sizes[2] == 64 and gpu.arch in (86, 89, 120):  # one of them spills 8 bytes
            continue
        tile = tile_config(*sizes)
        inner = p.channels * (1 + recomputed)
        size = sizes[:2]
        works = [tile_product(p, inner, p.hidden, *size, GELU_BWD_OPS, read, 2 * wide, weights * (1 + recomputed))]
        if p.grn:
            works += [response_work(p, 3 * p.tiles(size[0])), pointwise(p, 4 * wide)]
        yield Candidate(tile_name(tile), {"tile": tile}, tuple(works))
    if not p.grn:
        product = product_by_library(p, p.channels, p.hidden, gpu)
        steps = [pointwise(p, p.channels * (p.stream_itemsize + 4)), *[product] * (1 + recomputed)]
        steps += [pointwise(p, 3 * wide), pointwise(p, 2 * wide), pointwise(p, wide)]
        yield Candidate(LIBRARY, {"library": True}, tuple(steps), LIBRARY_HANDICAP)


def input_gradient_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the gradient of x from that of the hidden's pre-activation."""
    element, wide = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    weights = float(p.channels * wide)
    norm = pointwise(p, 3 * element)
    # LayerNorm's backward needs sums over rows: it runs in the epilogue if one program has whole rows
    tiles, steps = TF32_INPUT_TILES if p.rounded else INPUT_TILES, (norm,)
    if p.channels <= (128 if p.rounded else whole_row_channels(gpu.arch)):
        bc, count = pieces(p.channels)
        tiles, steps = ((64, bc, count, 32, 4 if bc * count <= 96 else 8, 2),), ()
    for bm, bc, count, bk, warps, stages in tiles:
        work = tile_product(p, p.hidden, p.channels, bm, bc * count, 12, wide, 2 * element, weights)
        tile = {"BM": bm, "BC": bc, "PIECES": count, "BK": bk, "num_warps": warps, "num_stages": stages}
        yield Candidate(f"{bm}x{count}x{bc}-k{bk}-s{stages}", {"tile": tile}, (work, *steps))
    product = product_by_library(p, p.hidden, p.channels, gpu)
    yield Candidate(LIBRARY, {"library": True}, (product, norm), LIBRARY_HANDICAP)


def weight_gradient_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the gradients of both weights."""
    for bm, bn, bp, warps, stages in TF32_TILES if p.rounded else WEIGHT_TILES:
        if gpu.arch in (100, 103) and p.rounded and (bm, bn) == (64, 64):  # spills 12 bytes
            continue
        tiles = -(-p.channels // bm) * -(-p.hidden // bn)
        splits = min(-(-2 * gpu.sms // tiles), max(1, p.pixels // (4 * bp)))
        partials = 4.0 * splits * p.channels * p.hidden
        reread = -(-p.hidden // bn) * p.channels + -(-p.channels // bm) * p.hidden
        work = Work(
            dram_bytes=p.pixels * (p.channels + p.hidden) * float(p.compute_itemsize) + 2 * partials,
            l2_bytes=p.pixels * float(p.compute_itemsize) * reread + partials,
            tensor_flops=2.0 * p.pixels * p.channels * p.hidden / TRITON_SHARE,
            tf32=p.rounded,
            programs=tiles * splits,
            ctas_per_sm=2,
            warps=warps,
        )
        # By TMA 64 x 64 with 4 stages and 128 x 128.
        for tma in (0, 1) if described(p, gpu) and (bn == 128 or stages == 4) else (0,):
            tile = {"BM": bm, "BN": bn, "BP": bp, "num_warps": warps, "num_stages": stages, "TMA": tma}
            name = f"{bm}x{bn}-p{bp}-s{stages}" + "-tma" * tma
            yield Candidate(name, {"tile": tile}, (work, work))
    product = cublas_product(p.channels, p.pixels, p.hidden, p.compute_itemsize, gpu, p.tf32)
    works = product, product, pointwise(p, p.channels * (p.stream_itemsize + 2)), pointwise(p, p.channels * 2)
    # Hopper's and Blackwell's tensor cores reach their peak in cuBLAS only, until a timing says otherwise. But the
    # library rounds its result to 16 bits, which ours does not where the parameters are fp32, under autocast. Of fewer
    # channels the products are small, and four operators of PyTorch take 3 units more host time (proofs/host_time.py).
    preferred = gpu.arch >= 90 and p.stream_itemsize == p.compute_itemsize and p.channels >= 384
    handicap = 1 / LIBRARY_HANDICAP if preferred else LIBRARY_HANDICAP
    yield Candidate(LIBRARY, {"library": True}, works, handicap)


def _data_tiles(p: Problem, arch: int) -> Iterator[tuple[int, int, int]]:
    """(BM, BH, warps) of `mlp_data_gradient_kernel` that compile without a spill."""
    if p.channels <= 96:
        yield 64, 32, 4
        yield 128, 32, 8
        if arch == 90 or (arch in (100, 103) and not p.grn):  # with GRN it spills 24 bytes on sm_100
            yield 128, 64, 8
    elif p.channels <= 128:
        yield 64, 32, 8
    elif p.channels <= FUSED_GRADIENT_CHANNELS:
        yield 32, 32, 4
        if arch in (90, 100, 103):
            yield 64, 32, 8


def data_gradient_candidates(p: Problem, gpu: tuning.Gpu, stored: bool = True) -> Iterator[Candidate]:
    """Every way to compute the gradient of x in one kernel, which also stores du and g if `stored`."""
    bc, count = pieces(p.channels)
    element, weights = p.channels * p.itemsize, 2.0 * p.channels * p.hidden * p.compute_itemsize
    read = element + p.channels * p.stream_itemsize

    def work(tile: tuple[int, int, int], products: int, written: float) -> Work:
        bm, _, warps = tile
        tiles = p.tiles(bm)
        moved = p.pixels * (read + written)
        return Work(
            dram_bytes=moved + weights,
            l2_bytes=moved + tiles * weights,
            tensor_flops=2.0 * tiles * bm * products * bc * count * p.hidden / TRITON_SHARE,
            fp32_ops=tiles * bm * (p.hidden * GELU_BWD_OPS + p.channels * NORM_BWD_OPS),
            programs=tiles,
            ctas_per_sm=2 if warps == 4 else 1,
            warps=warps,
        )

    for tile in _data_tiles(p, gpu.arch):
        bm, bh, warps = tile
        launches = (work(tile, 3, element + p.channels * 2 + stored * 2 * p.hidden * p.compute_itemsize),)
        if p.grn:
            launches = (work(tile, 2, 0), response_work(p, 3 * p.tiles(bm)), *launches)
        config = {"BM": bm, "BC": bc, "PIECES": count, "BH": bh, "num_warps": warps, "num_stages": 2}
        yield Candidate(f"m{bm}-h{bh}-w{warps}", {"tile": config}, launches)


def recomputed_weight_gradient_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the gradients of both weights from z and dout."""
    if p.grn:
        return
    bc, count = pieces(p.channels)
    for bh, bp, warps in _recomputed_tiles(p, gpu.arch):
        columns = -(-p.hidden // bh)
        splits = min(-(-2 * gpu.sms // columns), max(1, p.pixels // (4 * bp)))
        partials = 8.0 * splits * p.channels * p.hidden
        row = p.channels * (p.stream_itemsize + p.compute_itemsize)
        work = Work(
            dram_bytes=p.pixels * row + 2 * partials,
            l2_bytes=p.pixels * row * columns + partials,
            tensor_flops=2.0 * p.pixels * 4 * bc * count * columns * bh / TRITON_SHARE,
            fp32_ops=p.pixels * columns * bh * GELU_BWD_OPS,
            programs=columns * splits,
            ctas_per_sm=2 if warps == 4 else 1,
            warps=warps,
        )
        tile = {"BH": bh, "BP": bp, "BC": bc, "PIECES": count, "num_warps": warps, "num_stages": 2}
        yield Candidate(f"h{bh}-p{bp}-w{warps}", {"recompute": True, "tile": tile}, (work,))


def _recomputed_tiles(p: Problem, arch: int) -> Iterator[tuple[int, int, int]]:
    """(BH, BP, warps) of `mlp_recomputed_weight_gradient_kernel` that compile without a spill."""
    if p.channels <= 96:
        yield 64, 16, 4
        yield 128, 16, 8
        if arch in (90, 100, 103):
            yield 64, 32, 4
    elif p.channels <= 128:
        yield 64, 16, 8


Candidates = Callable[[Problem, tuning.Gpu], Iterator[Candidate]]
GRADIENTS: dict[str, Candidates] = {
    "mlp_hidden_gradient": hidden_gradient_candidates,
    "mlp_input_gradient": input_gradient_candidates,
    "mlp_weight_gradient": weight_gradient_candidates,
}
# Of one kernel for the gradient of the data, and what stores or computes again what the weights' need.
FUSED_GRADIENTS: dict[str, dict[str, Candidates]] = {
    "fused": {
        "mlp_data_gradient": data_gradient_candidates,
        "mlp_weight_gradient": weight_gradient_candidates,
    },
    "recomputed": {
        "mlp_data_gradient": functools.partial(data_gradient_candidates, stored=False),
        "mlp_recomputed_weight_gradient": recomputed_weight_gradient_candidates,
    },
}


def _chain(plan: str, name: str, p: Problem, parts: Sequence[Candidate], handicap: float = 1.0) -> Candidate:
    """The plan of these candidates, in the order of `GRADIENTS` or `FUSED_GRADIENTS`."""
    keys = ("hidden", "input", "weight") if plan == "gemm" else ("data", "weight")
    config = {"plan": plan, **{key: part.config for key, part in zip(keys, parts, strict=True)}}
    norm = [pointwise(p, p.channels * (p.itemsize + 2))] if plan == "gemm" else []
    return Candidate(name, config, (*norm, *(work for part in parts for work in part.launches)), handicap)


def _gradient_cublas(p: Problem, gpu: tuning.Gpu, handicap: float) -> Candidate:
    element, wide = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    rows = p.channels * p.compute_itemsize
    steps = [pointwise(p, element + rows), pointwise(p, 2 * wide), pointwise(p, element + 2 * rows)]
    if not p.keeps_hidden:
        steps.append(product_by_library(p, p.channels, p.hidden, gpu))
    steps += [product_by_library(p, p.channels, p.hidden, gpu)] * 4
    if p.grn:
        steps += [pointwise(p, wide), pointwise(p, 2 * wide), pointwise(p, 2 * wide), pointwise(p, 3 * wide)]
    steps += [pointwise(p, 3 * wide), pointwise(p, wide), pointwise(p, 3 * element)]
    return Candidate("cublas", {"plan": "cublas"}, tuple(steps), handicap)


def backward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the backward pass. All but the first have kernels that are choices of their own."""
    fused = []
    for plan, kernels in FUSED_GRADIENTS.items() if p.compute_itemsize == 2 else ():
        offered = [tuple(candidates(p, gpu)) for candidates in kernels.values()]
        if all(offered):
            parts = [tuning.predicted(candidates, gpu) for candidates in offered]
            fused.append(_chain(plan, plan, p, parts, RECOMPUTED_HANDICAP if plan == "recomputed" else 1.0))
    yield _gradient_cublas(p, gpu, HANDICAP**2 if fused else HANDICAP)
    yield from fused
    if ours(p, gpu):
        parts = [tuning.predicted(tuple(candidates(p, gpu)), gpu) for candidates in GRADIENTS.values()]
        yield _chain("gemm", "gemm", p, parts, HANDICAP if fused else 1.0)


@tuning.remembered
def backward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the backward pass runs."""
    p = rounded_batch(p)
    plan = tuning.pick("mlp_backward", p, tuple(backward_candidates(p, gpu)), gpu)
    name = plan.name
    if name == "cublas":
        return plan
    kernels = GRADIENTS if name == "gemm" else FUSED_GRADIENTS[name]
    parts = [tuning.pick(kernel, p, tuple(candidates(p, gpu)), gpu) for kernel, candidates in kernels.items()]
    return _chain(name, f"{name} {', '.join(part.name for part in parts)}", p, parts)
