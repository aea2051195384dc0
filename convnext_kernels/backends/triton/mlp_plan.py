"""The choice of plan and tiles for the inverted bottleneck: the candidates and their predicted costs.

Choices are cached. Only tile sizes that compile without a spill on an architecture are candidates for it;
`proofs/records/triton_kernels.md` lists registers and shared memory of each.
"""

from collections.abc import Iterator
from typing import NamedTuple

from convnext_kernels import tuning
from convnext_kernels.tuning import Candidate, Work
from convnext_kernels.tuning.cost import cublas_product

FUSED_CHANNELS = 256  # the accumulators of more channels spill


def whole_row_channels(arch: int) -> int:
    """The longest row that fits in registers beside the accumulators, for LayerNorm's backward; longer rows spill."""
    return 192 if arch in (80, 90) else 128


WEIGHT_TILE = {"BM": 64, "BN": 64, "BP": 64, "num_warps": 4, "num_stages": 2}
# The share of the tensor cores' peak that a matmul in Triton reaches.
TRITON_SHARE = 0.6
# Once for each plan with fewer launches; in the order of launches the plans are fused, gemm, cublas.
HANDICAP = 1.5
GELU_OPS, GELU_BWD_OPS = 16, 26  # fp32 instructions per element, including bias, conversion and store


class Problem(NamedTuple):
    """Everything that the choice depends on."""

    samples: int
    sample_pixels: int
    channels: int
    hidden: int
    grn: bool
    dtype: str  # of x: "bfloat16"
    compute_dtype: str  # of the matmuls
    keeps_hidden: bool
    tf32: bool  # fp32 matmuls may run as TF32
    stream: str = ""  # dtype of the residual, the result and its gradient, if it is not x's

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.dtype == "float32" else 2

    @property
    def stream_itemsize(self) -> int:
        """Bytes of an element of the residual, the result and its gradient."""
        return 4 if (self.stream or self.dtype) == "float32" else 2

    @property
    def pixels(self) -> int:
        """Of all samples."""
        return self.samples * self.sample_pixels

    @property
    def compute_itemsize(self) -> int:
        """Bytes of an element of the hidden and the weights."""
        return 4 if self.compute_dtype == "float32" else 2

    def tiles(self, bm: int) -> int:
        """Tiles of `bm` pixels; with GRN a tile lies within one sample."""
        if self.grn:
            return self.samples * -(-self.sample_pixels // bm)
        return -(-self.pixels // bm)


def pieces(channels: int, widest: int = 128) -> tuple[int, int]:
    """(BC, PIECES): equal power-of-two pieces that cover a row with the least padding; of equal ones the fewest pieces.

    A matmul needs at least 16 columns; more than `widest` in one accumulator spill.
    """
    choices = [(bc, -(-channels // bc)) for bc in (128, 64, 32, 16) if bc <= widest]
    choices = [(bc, count) for bc, count in choices if count <= 4] or choices[:1]
    return min(choices, key=lambda choice: (choice[0] * choice[1], choice[1]))


def _fused_tiles(channels: int, grn: bool, arch: int) -> Iterator[tuple[int, int, int]]:
    """(BM, BH, warps) that compile without a spill: the accumulators, BM x C fp32, fill the registers."""
    if channels <= 96:
        if not (grn and arch == 120):  # spills 8 bytes
            yield 128, 64, 4
    elif arch in (90, 100, 103):
        yield 128, 64, 8
    yield 64, 64 if channels <= 128 else 32, 4


def _tile_product(
    p: Problem, inner: int, outer: int, bm: int, bn: int, ops: float, read: float, written: float, weights: float
) -> Work:
    """One of our matmul kernels; `ops` fp32 instructions per result, `read` and `written` bytes per pixel."""
    tiles, columns = p.tiles(bm), -(-outer // bn)
    padded = tiles * bm
    return Work(
        dram_bytes=p.pixels * (read + written) + weights,
        l2_bytes=padded * read * columns + p.pixels * written + tiles * weights,
        tensor_flops=2.0 * padded * inner * columns * bn / TRITON_SHARE,
        fp32_ops=padded * columns * bn * ops,
        programs=tiles * columns,
        ctas_per_sm=2 if bm * bn <= 128 * 64 else 1,
        warps=8 if bm * bn > 128 * 64 else 4,
    )


def _response_work(p: Problem, tiles: int) -> Work:
    return Work(dram_bytes=4.0 * p.hidden * (tiles + p.samples), programs=p.samples)


def _fused(p: Problem, bm: int, bh: int, warps: int) -> Candidate:
    bc, count = pieces(p.channels)
    tiles = p.tiles(bm)
    padded, padded_c = tiles * bm, bc * count
    weights = 2.0 * p.channels * p.hidden * p.compute_itemsize

    def work(products: int, streams: int) -> Work:
        moved = p.pixels * p.channels * (p.itemsize + p.stream_itemsize * streams)
        moved += p.pixels * p.hidden * 2 * p.keeps_hidden
        return Work(
            dram_bytes=moved + weights * products / 2,
            l2_bytes=moved + tiles * weights * products / 2,
            tensor_flops=2.0 * padded * products * padded_c * p.hidden / TRITON_SHARE,
            fp32_ops=padded * p.hidden * GELU_OPS,
            programs=tiles,
            ctas_per_sm=2 if warps == 4 else 1,
            warps=warps,
        )

    launches = (work(2, 2),)
    if p.grn:
        launches = (work(1, 0), _response_work(p, tiles), work(2, 2))
    config = {"plan": "fused", "BM": bm, "BC": bc, "PIECES": count, "BH": bh, "num_warps": warps, "num_stages": 2}
    return Candidate(f"fused-m{bm}-h{bh}-w{warps}", config, launches)


def _two_products(p: Problem, expand: dict, project: dict, handicap: float) -> Candidate:
    weights = p.channels * p.hidden * 2.0
    element, hidden = p.channels * p.itemsize, p.hidden * 2
    tile = expand["BM"], expand["BN"]
    first = _tile_product(p, p.channels, p.hidden, *tile, GELU_OPS, element, hidden * (1 + p.keeps_hidden), weights)
    tile = project["BM"], project["BN"]
    second = _tile_product(p, p.hidden, p.channels, *tile, 8, hidden, 2 * p.channels * p.stream_itemsize, weights)
    response = (_response_work(p, p.tiles(expand["BM"])),) if p.grn else ()
    config = {"plan": "gemm", "expand": expand, "project": project}
    name = f"gemm-{expand['BM']}x{expand['BN']}-{project['BM']}x{project['BN']}"
    return Candidate(name, config, (first, *response, second), handicap)


def _pointwise(p: Problem, bytes_per_pixel: float) -> Work:
    return Work(
        dram_bytes=p.pixels * bytes_per_pixel,
        l2_bytes=p.pixels * bytes_per_pixel,
        programs=max(1, int(p.pixels * bytes_per_pixel) // 8192),
        ctas_per_sm=8,
    )


def _cublas_product(p: Problem, inner: int, outer: int, gpu: tuning.Gpu) -> Work:
    return cublas_product(p.pixels, inner, outer, p.compute_itemsize, gpu, p.tf32)


def _cublas(p: Problem, gpu: tuning.Gpu, handicap: float) -> Candidate:
    element, hidden = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    steps = [
        _pointwise(p, element + p.channels * p.compute_itemsize),
        _cublas_product(p, p.channels, p.hidden, gpu),
        _pointwise(p, 2 * hidden),
    ]
    if p.grn:
        steps += [_pointwise(p, hidden), _response_work(p, p.samples), _pointwise(p, 2 * hidden)]
    steps += [
        _cublas_product(p, p.hidden, p.channels, gpu),
        _pointwise(p, p.channels * (2 * p.stream_itemsize + p.compute_itemsize)),
    ]
    return Candidate("cublas", {"plan": "cublas"}, tuple(steps), handicap)


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int = 2) -> dict:
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}


# (expand, project): large tiles read less, small tiles fill the GPU at small batches. With 4 warps, BK 64 in `expand`
# spills up to 100 bytes on sm_80 and sm_120, because the loop for the statistics needs two tiles.
PRODUCT_TILES = (
    (_tile(128, 128, 64, 8), _tile(128, 128, 64, 8)),
    (_tile(128, 64, 32, 4), _tile(128, 64, 64, 4)),
    (_tile(64, 64, 32, 4), _tile(64, 64, 64, 4)),
)


def forward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the forward pass."""
    # Not for V2 with the hidden kept: the launch for the sums spills on sm_100, and the fused plan would save little,
    # because the hidden is written anyway.
    fused = p.compute_itemsize == 2 and p.channels <= FUSED_CHANNELS and not (p.grn and p.keeps_hidden)
    if fused:
        for tile in _fused_tiles(p.channels, p.grn, gpu.arch):
            yield _fused(p, *tile)
    if p.compute_itemsize == 2:
        handicap = HANDICAP if fused and not p.grn else 1.0  # with GRN both take three launches
        for expand, project in PRODUCT_TILES:
            if gpu.arch in (100, 103) and p.stream_itemsize == 4 and project["BM"] == 128:
                project = _tile(128, 64, 64, 8)  # the larger ones spill 80 bytes beside a 4-byte residual
            yield _two_products(p, expand, project, handicap)
    yield _cublas(p, gpu, HANDICAP**2 if fused else HANDICAP)


def _class(p: Problem) -> Problem:
    """The problem with its batch rounded up to a power of two, so that batch 7 uses the kernels of batch 8."""
    return p._replace(samples=1 << (p.samples - 1).bit_length())


@tuning.remembered
def forward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the forward pass runs."""
    p = _class(p)
    return tuning.pick("mlp_forward", p, tuple(forward_candidates(p, gpu)), gpu)


def _weight_work(p: Problem, gpu: tuning.Gpu) -> Work:
    tiles = -(-p.channels // WEIGHT_TILE["BM"]) * -(-p.hidden // WEIGHT_TILE["BN"])
    splits = min(-(-2 * gpu.sms // tiles), max(1, p.pixels // 256))
    read = p.pixels * (p.channels + p.hidden) * 2.0
    partials = 4.0 * splits * p.channels * p.hidden
    reread = -(-p.hidden // WEIGHT_TILE["BN"]) * p.channels + -(-p.channels // WEIGHT_TILE["BM"]) * p.hidden
    return Work(
        dram_bytes=read + 2 * partials,
        l2_bytes=p.pixels * 2.0 * reread + partials,
        tensor_flops=2.0 * p.pixels * p.channels * p.hidden / TRITON_SHARE,
        programs=tiles * splits,
        ctas_per_sm=2,
    )


def _gradient_products(p: Problem, gpu: tuning.Gpu, hidden: dict) -> Candidate:
    element, wide, weights = p.channels * p.itemsize, p.hidden * 2, p.channels * p.hidden * 2.0
    tile = hidden["BM"], hidden["BN"]
    recomputed = not p.keeps_hidden
    inner = p.channels * (1 + recomputed)
    read = p.channels * p.stream_itemsize + (p.channels * 2 if recomputed else wide)
    first = _tile_product(p, inner, p.hidden, *tile, GELU_BWD_OPS, read, 2 * wide, weights * (1 + recomputed))
    steps = [_pointwise(p, element + 2 * p.channels), first]
    if p.grn:
        steps += [_response_work(p, 3 * p.tiles(hidden["BM"])), _pointwise(p, 4 * wide)]
    # LayerNorm's backward needs sums over rows: it runs in the epilogue if one program has whole rows
    bc, count = pieces(p.channels)
    whole = p.channels <= whole_row_channels(gpu.arch)
    if not whole:
        bc, count = 64, 2
    data = {"BM": 64, "BC": bc, "PIECES": count, "BK": 32, "num_warps": 4 if bc * count <= 96 else 8, "num_stages": 2}
    steps.append(_tile_product(p, p.hidden, p.channels, 64, bc * count, 12, wide, 2 * element, weights))
    if not whole:
        steps.append(_pointwise(p, 3 * element))
    steps += [_weight_work(p, gpu), _weight_work(p, gpu)]
    # With a 4-byte gradient of the result BP 64 spills 4 bytes on sm_100.
    weight = WEIGHT_TILE | ({"BP": 32} if p.stream_itemsize == 4 else {})
    config = {"plan": "gemm", "hidden": hidden, "input": data, "weight": weight}
    return Candidate(f"gemm-{hidden['BM']}x{hidden['BN']}", config, tuple(steps))


def _gradient_cublas(p: Problem, gpu: tuning.Gpu) -> Candidate:
    element, wide = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    rows = p.channels * p.compute_itemsize
    steps = [_pointwise(p, element + rows), _pointwise(p, 2 * wide), _pointwise(p, element + 2 * rows)]
    if not p.keeps_hidden:
        steps.append(_cublas_product(p, p.channels, p.hidden, gpu))
    steps += [_cublas_product(p, p.channels, p.hidden, gpu)] * 4
    if p.grn:
        steps += [_pointwise(p, wide), _pointwise(p, 2 * wide), _pointwise(p, 2 * wide), _pointwise(p, 3 * wide)]
    steps += [_pointwise(p, 3 * wide), _pointwise(p, wide), _pointwise(p, 3 * element)]
    return Candidate("cublas", {"plan": "cublas"}, tuple(steps), HANDICAP)


HIDDEN_TILES = (_tile(64, 128, 32, 8), _tile(64, 64, 32, 4))


def backward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the backward pass."""
    if p.compute_itemsize == 2:
        for hidden in HIDDEN_TILES:
            yield _gradient_products(p, gpu, hidden)
    yield _gradient_cublas(p, gpu)


@tuning.remembered
def backward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the backward pass runs."""
    p = _class(p)
    return tuning.pick("mlp_backward", p, tuple(backward_candidates(p, gpu)), gpu)
