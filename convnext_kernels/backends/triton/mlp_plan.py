"""The choice of plan and tiles for the inverted bottleneck: the candidates and their predicted costs.

Choices are cached. Only tile sizes that compile without a spill on an architecture are candidates for it;
`proofs/records/triton_kernels.md` lists registers and shared memory of each.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from convnext_kernels import tuning
from convnext_kernels.tuning import Candidate, Work
from convnext_kernels.tuning.cost import cublas_product

FUSED_CHANNELS = 256  # the accumulators of more channels spill
FUSED_GRADIENT_CHANNELS = 192  # in the backward pass


def whole_row_channels(arch: int) -> int:
    """The longest row that fits in registers beside the accumulators, for LayerNorm's backward; longer rows spill."""
    return 192 if arch in (80, 90) else 128


# The share of the tensor cores' peak that a matmul in Triton reaches.
TRITON_SHARE = 0.6
# Once for each plan with fewer launches; in the order of launches the plans are fused, gemm, cublas.
HANDICAP = 1.5
# The same for a single product by the library, whose launches between products are ours.
LIBRARY, LIBRARY_HANDICAP = "library", 1.3
FOLD_ROWS = 16  # of W1 that a program of `fold_kernel` takes
GELU_OPS, GELU_BWD_OPS = 16, 26  # fp32 instructions per element, including bias, conversion and store
NORM_BWD_OPS = 30  # of a row's element in `mlp_data_gradient_kernel`: the norm, dz and the norm's backward
# The products of a step and the activation between them wait for one another, with one or two programs on a
# multiprocessor; the model has them at the same time.
RECOMPUTED_HANDICAP = 1.3


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

    @property
    def rounded(self) -> bool:
        """Whether fp32 matmuls are rounded to TF32, so that tensor cores compute them."""
        return self.tf32 and self.compute_itemsize == 4

    def ours(self, gpu: tuning.Gpu) -> bool:
        """Whether our kernels can compute the matmuls; IEEE fp32 is the library's, and on AMD's GPUs all fp32."""
        return self.compute_itemsize == 2 or (self.rounded and not gpu.target)

    def described(self, gpu: tuning.Gpu) -> bool:
        """Whether matmuls may load through tensor descriptors: sm_90 on, rows of 16 bytes, row numbers in 32 bits."""
        aligned = self.channels % 8 == self.hidden % 8 == 0 and self.compute_itemsize == 2
        return aligned and not gpu.target and gpu.arch >= 90 and self.pixels < 2**31

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


def _fused_tiles(p: Problem, arch: int) -> Iterator[tuple[int, int, int]]:
    """(BM, BH, warps) that compile without a spill: the accumulators, BM x C fp32, fill the registers."""
    channels, grn = p.channels, p.grn
    if p.rounded:  # in 99 KB of shared memory only small tiles fit
        if channels <= 96 or (channels <= TF32_FUSED_CHANNELS and arch in (80, 90, 100, 103)):
            yield 128, 32, 8
        if channels <= TF32_FUSED_CHANNELS:
            yield 64, 32, 4
        return
    if p.stream_itemsize == 4 and (p.keeps_hidden or channels > 192):
        # Under autocast the epilogue has an fp32 residual: above 192 channels it spills up to 368 bytes, and with
        # stores of the hidden in the loop up to 152 with the other tiles.
        if channels <= 96:
            yield 64, 64, 4
        return
    if p.stream_itemsize == 4 and 96 < channels <= 128:  # the other tile of these spills 32 and 48 bytes
        yield (128, 64, 8) if arch == 90 else (64, 64, 4)
        return
    if channels <= 96:
        # With GRN it spills 8 bytes on sm_120, beside an fp32 residual 16 on sm_90.
        if not (grn and (arch == 120 or (arch == 90 and p.stream_itemsize == 4))):
            yield 128, 64, 4
    elif arch in (90, 100, 103):
        yield 128, 64, 8
    yield 64, 64 if channels <= 128 else 32, 4


def _tile_product(
    p: Problem,
    inner: int,
    outer: int,
    bm: int,
    bn: int,
    ops: float,
    read: float,
    written: float,
    weights: float,
    *,
    input_ops: float = 0.0,
    split: int = 1,
) -> Work:
    """One of our matmul kernels; `read` and `written` bytes per pixel.

    `ops` fp32 instructions per result, `input_ops` per element of a row, for every tile of columns; `split` programs
    share the sum of a result.
    """
    tiles, columns = p.tiles(bm), -(-outer // bn)
    padded = tiles * bm
    return Work(
        dram_bytes=p.pixels * (read + written) + weights,
        l2_bytes=padded * read * columns + p.pixels * written + tiles * weights,
        tensor_flops=2.0 * padded * inner * columns * bn / TRITON_SHARE,
        tf32=p.rounded,
        fp32_ops=padded * columns * (bn * ops + inner * input_ops),
        programs=tiles * columns * split,
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
        moved += p.pixels * p.hidden * p.compute_itemsize * p.keeps_hidden
        return Work(
            dram_bytes=moved + weights * products / 2,
            l2_bytes=moved + tiles * weights * products / 2,
            tensor_flops=2.0 * padded * products * padded_c * p.hidden / TRITON_SHARE,
            tf32=p.rounded,
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


def _pointwise(p: Problem, bytes_per_pixel: float) -> Work:
    return Work(
        dram_bytes=p.pixels * bytes_per_pixel,
        l2_bytes=p.pixels * bytes_per_pixel,
        programs=max(1, int(p.pixels * bytes_per_pixel) // 8192),
        ctas_per_sm=8,
    )


def _cublas_product(p: Problem, inner: int, outer: int, gpu: tuning.Gpu) -> Work:
    return cublas_product(p.pixels, inner, outer, p.compute_itemsize, gpu, p.tf32)


def _library_expand(p: Problem, gpu: tuning.Gpu) -> list[Work]:
    """The hidden by cuBLAS: norm, product, activation."""
    element, hidden = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    return [
        _pointwise(p, element + p.channels * p.compute_itemsize),
        _cublas_product(p, p.channels, p.hidden, gpu),
        _pointwise(p, 2 * hidden),
    ]


def _library_project(p: Problem, gpu: tuning.Gpu) -> list[Work]:
    """The result from the hidden by cuBLAS: product, residual."""
    return [
        _cublas_product(p, p.hidden, p.channels, gpu),
        _pointwise(p, p.channels * (2 * p.stream_itemsize + p.compute_itemsize)),
    ]


def _cublas(p: Problem, gpu: tuning.Gpu, handicap: float) -> Candidate:
    steps, hidden = _library_expand(p, gpu), p.hidden * p.compute_itemsize
    if p.grn:
        steps += [_pointwise(p, hidden), _response_work(p, p.samples), _pointwise(p, 2 * hidden)]
    return Candidate("cublas", {"plan": "cublas"}, (*steps, *_library_project(p, gpu)), handicap)


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int = 2) -> dict:
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}


def _tile_name(tile: dict) -> str:
    """Of a matmul kernel's configuration, for the cache."""
    parts = [f"{tile['BM']}x{tile['BN']}", f"k{tile['BK']}", f"s{tile['num_stages']}"]
    parts += [f"g{tile['GROUP']}"] if tile.get("GROUP", 1) > 1 else []
    parts += [f"split{tile['SPLIT']}"] if tile.get("SPLIT", 1) > 1 else []
    return "-".join([*parts, *("tma", "ws")[: tile.get("TMA", 0)]])


# (BM, BN, BK, warps, stages). Large tiles read less, and share the weights of a column between 8 tiles of pixels; small
# tiles fill the GPU at small batches. Tiles of 128 x 256 and 256 x 128 spill in their epilogues, 16 to 1164 bytes
# with 8 warps, 12 to 216 with 16.
SMALL_TILES = ((64, 64, 64, 4, 2), (128, 64, 32, 4, 2), (64, 128, 64, 4, 3))
LARGE_TILES = ((128, 128, 64, 8, 2), (128, 128, 32, 8, 4))
GROUP = 8
# Of the expand product that normalises its rows: with 4 warps and BK 64 it spills up to 100 bytes on sm_80 and sm_120,
# because the loop for the statistics needs two tiles.
NORMALISING_TILES = ((64, 64, 32, 4, 2), (128, 64, 32, 4, 2), (128, 128, 64, 8, 2))
FOLDED_CHANNELS = 257  # from here the expand product may have the norm's parameters in its weights
# The tensor cores wait for the walk over the rows, and their operand comes from registers: the model sees neither.
NORMALISING_HANDICAP = 1.15
NORMALISE_OPS, FOLD_OPS = 10, 4  # instructions per element of a row: two walks over it, or its statistics


# With loads by TMA, from sm_90 on, for `tune`: the model sees no difference, and nobody has timed them.
TMA_TILE, TMA_LARGE_TILE = (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)
# and by warps of their own
SPECIALISED_TILES = {90: (128, 128, 64, 4, 3), 100: (128, 128, 64, 8, 3), 103: (128, 128, 64, 8, 3)}

# Of TF32, whose tiles have twice the bytes.
TF32_FUSED_CHANNELS = 192
TF32_TILES = ((64, 64, 32, 4, 2), (128, 64, 32, 4, 2), (128, 128, 32, 8, 2))
TF32_HIDDEN_TILES = ((64, 64, 32, 4, 2), (64, 128, 32, 8, 2))
TF32_INPUT_TILES = ((64, 64, 1, 32, 4, 2), (128, 128, 1, 32, 8, 2))


def _product_tiles(p: Problem) -> Iterator[dict]:
    """The tiles of `mlp_folded_expand_kernel` and `mlp_project_kernel`."""
    if p.rounded:
        yield from (_tile(*tile) | {"GROUP": 1} for tile in TF32_TILES)
        return
    for tile in (*SMALL_TILES, *LARGE_TILES):
        yield _tile(*tile) | {"GROUP": GROUP if tile in LARGE_TILES else 1}


def _tma_tiles(p: Problem, gpu: tuning.Gpu) -> Iterator[dict]:
    """Tiles of `mlp_project_kernel` whose operands are loaded by TMA."""
    if not p.described(gpu):
        return
    yield _tile(*TMA_TILE) | {"GROUP": 1, "TMA": 1}
    if p.channels % 128 == 0:  # a tail spills on sm_100
        yield _tile(*TMA_LARGE_TILE) | {"GROUP": GROUP, "TMA": 1}
        if p.stream_itemsize == 2 and gpu.arch in SPECIALISED_TILES:  # beside an fp32 residual it spills 2688 bytes
            yield _tile(*SPECIALISED_TILES[gpu.arch]) | {"GROUP": GROUP, "TMA": 2}


def expand_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the hidden from x."""
    element, hidden = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    weights, written = float(p.channels * hidden), hidden * (1 + p.keeps_hidden)

    def product(tile: dict, input_ops: float) -> Work:
        size = tile["BM"], tile["BN"]
        return _tile_product(p, p.channels, p.hidden, *size, GELU_OPS, element, written, weights, input_ops=input_ops)

    for sizes in TF32_TILES if p.rounded else NORMALISING_TILES:
        tile = _tile(*sizes) | {"GROUP": 1}
        works = (product(tile, NORMALISE_OPS),)
        handicap = NORMALISING_HANDICAP if p.channels >= FOLDED_CHANNELS else 1.0
        yield Candidate(_tile_name(tile), {"fold": False, "tile": tile}, works, handicap)
    if p.channels >= FOLDED_CHANNELS:
        folding = Work(dram_bytes=weights * 2, programs=-(-p.hidden // FOLD_ROWS))
        for tile in _product_tiles(p):
            works = folding, product(tile, FOLD_OPS)
            yield Candidate(f"fold-{_tile_name(tile)}", {"fold": True, "tile": tile}, works)
    if not p.grn:
        yield Candidate(LIBRARY, {"library": True}, tuple(_library_expand(p, gpu)), LIBRARY_HANDICAP)


def project_candidates(p: Problem, gpu: tuning.Gpu, library: bool = True) -> Iterator[Candidate]:
    """Every way to compute the result from the hidden; by the library only if `library`."""
    hidden, stream = p.hidden * p.compute_itemsize, p.channels * p.stream_itemsize
    weights = float(p.channels * hidden)
    for tile in ({"TMA": 0} | tile for tile in (*_product_tiles(p), *_tma_tiles(p, gpu))):
        if gpu.arch in (100, 103) and p.stream_itemsize == 4 and not p.rounded and tile["BM"] == 128:
            continue  # spills 80 bytes beside a 4-byte residual
        size = tile["BM"], tile["BN"]
        work = _tile_product(p, p.hidden, p.channels, *size, 8, hidden, 2 * stream, weights)
        yield Candidate(_tile_name(tile), {"tile": tile | {"SPLIT": 1}}, (work,))
        split = min(8, p.hidden // 256, gpu.sms // max(1, work.programs))
        if tile["BM"] == 64 and split > 1:  # batch 1 of late stages has few tiles
            tile = tile | {"SPLIT": split}
            sums = 4.0 * split * p.channels
            work = _tile_product(p, p.hidden, p.channels, *size, 8, hidden, sums, weights, split=split)
            yield Candidate(_tile_name(tile), {"tile": tile}, (work, _pointwise(p, sums + 2 * stream)))
    if library and not p.grn:
        yield Candidate(LIBRARY, {"library": True}, tuple(_library_project(p, gpu)), LIBRARY_HANDICAP)


def forward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the forward pass. The last one is two products, whose kernels are choices of their own."""
    # Not for V2 with the hidden kept: the launch for the sums spills on sm_100, and the fused plan would save little,
    # because the hidden is written anyway.
    tiles: tuple = ()
    if p.ours(gpu) and p.channels <= FUSED_CHANNELS and not (p.grn and p.keeps_hidden):
        tiles = tuple(_fused_tiles(p, gpu.arch))
    for tile in tiles:
        yield _fused(p, *tile)
    fused = bool(tiles)
    yield _cublas(p, gpu, HANDICAP**2 if fused else HANDICAP)
    if p.ours(gpu):
        handicap = HANDICAP if fused and not p.grn else 1.0  # with GRN both take three launches
        yield _products("gemm", p, gpu, tuning.predicted, handicap)


def _products(name: str, p: Problem, gpu: tuning.Gpu, choose: Callable, handicap: float = 1.0) -> Candidate:
    """The plan of two products, each of which ``choose(candidates, gpu)`` takes from its candidates."""
    expand = choose(tuple(expand_candidates(p, gpu)), gpu)
    library = "library" not in expand.config  # both by the library are the plan "cublas"
    project = choose(tuple(project_candidates(p, gpu, library)), gpu)
    name = name or f"gemm {expand.name}, {project.name}"
    response = ()
    if p.grn:
        response = (_response_work(p, p.tiles(expand.config["tile"]["BM"])),)
    config = {"plan": "gemm", "expand": expand.config, "project": project.config}
    return Candidate(name, config, (*expand.launches, *response, *project.launches), handicap)


def _class(p: Problem) -> Problem:
    """The problem with its batch rounded up to a power of two, so that batch 7 uses the kernels of batch 8."""
    return p._replace(samples=1 << (p.samples - 1).bit_length())


@tuning.remembered
def forward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the forward pass runs."""
    p = _class(p)
    plan = tuning.pick("mlp_forward", p, tuple(forward_candidates(p, gpu)), gpu)
    if plan.config["plan"] != "gemm":
        return plan
    kernels = iter(("mlp_expand", "mlp_project"))
    return _products("", p, gpu, lambda candidates, gpu: tuning.pick(next(kernels), p, candidates, gpu))


# (BM, BN, BK, warps, stages)
HIDDEN_TILES = (
    *((64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (64, 64, 64, 4, 3), (64, 128, 64, 8, 2), (128, 64, 64, 8, 2)),
    (128, 128, 32, 8, 3),
)
# For rows in several programs: (BM, BC, PIECES, BK, warps, stages).
INPUT_TILES = ((64, 64, 2, 32, 8, 2), (64, 64, 1, 64, 4, 4), (128, 128, 1, 64, 8, 2), (128, 64, 2, 64, 8, 3))
# (BM, BN, BP, warps, stages)
WEIGHT_TILES = ((64, 64, 64, 4, 2), (64, 64, 64, 4, 4), (128, 64, 64, 4, 3), (128, 128, 64, 8, 2))
# Of 128 x 64, for `tune` only: without it the predicted default is 0.2 % slower on average, at most 34 %, and training
# steps compile the kernel 11 times instead of 13 (proofs/compilations.py).
MIDDLE_TILE_HANDICAP = 1.5


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
        tile = _tile(*sizes) | {"GROUP": 1}
        inner = p.channels * (1 + recomputed)
        size = sizes[:2]
        works = [_tile_product(p, inner, p.hidden, *size, GELU_BWD_OPS, read, 2 * wide, weights * (1 + recomputed))]
        if p.grn:
            works += [_response_work(p, 3 * p.tiles(size[0])), _pointwise(p, 4 * wide)]
        yield Candidate(_tile_name(tile), {"tile": tile}, tuple(works))
    if not p.grn:
        product = _cublas_product(p, p.channels, p.hidden, gpu)
        steps = [_pointwise(p, p.channels * (p.stream_itemsize + 4)), *[product] * (1 + recomputed)]
        steps += [_pointwise(p, 3 * wide), _pointwise(p, 2 * wide), _pointwise(p, wide)]
        yield Candidate(LIBRARY, {"library": True}, tuple(steps), LIBRARY_HANDICAP)


def input_gradient_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the gradient of x from that of the hidden's pre-activation."""
    element, wide = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    weights = float(p.channels * wide)
    norm = _pointwise(p, 3 * element)
    # LayerNorm's backward needs sums over rows: it runs in the epilogue if one program has whole rows
    tiles, steps = TF32_INPUT_TILES if p.rounded else INPUT_TILES, (norm,)
    if p.channels <= (128 if p.rounded else whole_row_channels(gpu.arch)):
        bc, count = pieces(p.channels)
        tiles, steps = ((64, bc, count, 32, 4 if bc * count <= 96 else 8, 2),), ()
    for bm, bc, count, bk, warps, stages in tiles:
        work = _tile_product(p, p.hidden, p.channels, bm, bc * count, 12, wide, 2 * element, weights)
        tile = {"BM": bm, "BC": bc, "PIECES": count, "BK": bk, "num_warps": warps, "num_stages": stages, "GROUP": 1}
        yield Candidate(f"{bm}x{count}x{bc}-k{bk}-s{stages}", {"tile": tile}, (work, *steps))
    product = _cublas_product(p, p.hidden, p.channels, gpu)
    yield Candidate(LIBRARY, {"library": True}, (product, norm), LIBRARY_HANDICAP)


def weight_gradient_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the gradients of both weights."""
    for bm, bn, bp, warps, stages in TF32_TILES if p.rounded else WEIGHT_TILES:
        if gpu.arch == 86 and not p.rounded and (bm, bn) == (128, 64):  # spills 8 bytes
            continue
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
        handicap = MIDDLE_TILE_HANDICAP if (bm, bn, p.rounded) == (128, 64, False) else 1.0
        # By TMA 64 x 64 with 4 stages and 128 x 128; 128 x 64 spills 38 bytes with sums.
        for tma in (0, 1) if p.described(gpu) and (bn == 128 or stages == 4) else (0,):
            tile = {"BM": bm, "BN": bn, "BP": bp, "num_warps": warps, "num_stages": stages, "TMA": tma}
            name = f"{bm}x{bn}-p{bp}-s{stages}" + "-tma" * tma
            yield Candidate(name, {"tile": tile}, (work, work), handicap)
    product = cublas_product(p.channels, p.pixels, p.hidden, p.compute_itemsize, gpu, p.tf32)
    works = product, product, _pointwise(p, p.channels * (p.stream_itemsize + 2)), _pointwise(p, p.channels * 2)
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
            launches = (work(tile, 2, 0), _response_work(p, 3 * p.tiles(bm)), *launches)
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


def _gradient_products(name: str, p: Problem, parts: Sequence[Candidate], handicap: float = 1.0) -> Candidate:
    """The plan of separate products, in the order of `GRADIENTS`."""
    works = [_pointwise(p, p.channels * (p.itemsize + 2)), *(work for part in parts for work in part.launches)]
    keys = ("hidden", "input", "weight")
    config = {"plan": "gemm", **{k: part.config for k, part in zip(keys, parts, strict=True)}}
    return Candidate(name, config, tuple(works), handicap)


def _fused_gradient(plan: str, name: str, parts: Sequence[Candidate]) -> Candidate:
    """A plan of `FUSED_GRADIENTS`."""
    data, weight = parts
    config = {"plan": plan, "data": data.config, "weight": weight.config}
    return Candidate(
        name, config, (*data.launches, *weight.launches), RECOMPUTED_HANDICAP if plan == "recomputed" else 1.0
    )


def _gradient_cublas(p: Problem, gpu: tuning.Gpu, handicap: float) -> Candidate:
    element, wide = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    rows = p.channels * p.compute_itemsize
    steps = [_pointwise(p, element + rows), _pointwise(p, 2 * wide), _pointwise(p, element + 2 * rows)]
    if not p.keeps_hidden:
        steps.append(_cublas_product(p, p.channels, p.hidden, gpu))
    steps += [_cublas_product(p, p.channels, p.hidden, gpu)] * 4
    if p.grn:
        steps += [_pointwise(p, wide), _pointwise(p, 2 * wide), _pointwise(p, 2 * wide), _pointwise(p, 3 * wide)]
    steps += [_pointwise(p, 3 * wide), _pointwise(p, wide), _pointwise(p, 3 * element)]
    return Candidate("cublas", {"plan": "cublas"}, tuple(steps), handicap)


def backward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the backward pass. All but the first have kernels that are choices of their own."""
    fused = []
    for plan, kernels in FUSED_GRADIENTS.items() if p.compute_itemsize == 2 else ():
        offered = [tuple(candidates(p, gpu)) for candidates in kernels.values()]
        if all(offered):
            fused.append(_fused_gradient(plan, plan, [tuning.predicted(candidates, gpu) for candidates in offered]))
    yield _gradient_cublas(p, gpu, HANDICAP**2 if fused else HANDICAP)
    yield from fused
    if p.ours(gpu):
        parts = [tuning.predicted(tuple(candidates(p, gpu)), gpu) for candidates in GRADIENTS.values()]
        yield _gradient_products("gemm", p, parts, HANDICAP if fused else 1.0)


@tuning.remembered
def backward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the backward pass runs."""
    p = _class(p)
    plan = tuning.pick("mlp_backward", p, tuple(backward_candidates(p, gpu)), gpu)
    name = plan.name
    if name == "cublas":
        return plan
    kernels = GRADIENTS if name == "gemm" else FUSED_GRADIENTS[name]
    parts = [tuning.pick(kernel, p, tuple(candidates(p, gpu)), gpu) for kernel, candidates in kernels.items()]
    full = f"{name} {', '.join(part.name for part in parts)}"
    return _gradient_products(full, p, parts) if name == "gemm" else _fused_gradient(name, full, parts)
