"""The choice of plan and tiles for the inverted bottleneck: the candidates and their predicted costs.

Choices are cached. Only tile sizes that compile without a spill on an architecture are candidates for it;
`proofs/records/triton_kernels.md` lists registers and shared memory of each.
"""

from collections.abc import Callable, Iterator

from convnext_kernels import tuning
from convnext_kernels.backends.gpu.mlp_plan import (
    GELU_OPS,
    HANDICAP,
    Problem,
    cublas,
    library_expand,
    library_project,
    pointwise,
    response_work,
)
from convnext_kernels.tuning import Candidate, Work

FUSED_CHANNELS = 256  # the accumulators of more channels spill
# The share of the tensor cores' peak that a matmul in Triton reaches.
TRITON_SHARE = 0.6
# As HANDICAP, for a single product by the library, whose launches between products are ours.
LIBRARY, LIBRARY_HANDICAP = "library", 1.3
FOLD_ROWS = 16  # of W1 that a program of `fold_kernel` takes


def ours(p: Problem, gpu: tuning.Gpu) -> bool:
    """Whether our kernels can compute the matmuls; IEEE fp32 is the library's, and on AMD's GPUs all fp32."""
    return p.compute_itemsize == 2 or (p.rounded and not gpu.target)


def described(p: Problem, gpu: tuning.Gpu) -> bool:
    """Whether matmuls may load through tensor descriptors: sm_90 on, rows of 16 bytes, row numbers in 32 bits."""
    aligned = p.channels % 8 == p.hidden % 8 == 0 and p.compute_itemsize == 2
    return aligned and not gpu.target and gpu.arch >= 90 and p.pixels < 2**31


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
    elif arch == 90 or (arch in (100, 103) and (channels <= 128 or p.stream_itemsize == 4)):
        yield 128, 64, 8  # at C 192 it spills 8 bytes on sm_100
    yield 64, 64 if channels <= 128 else 32, 4


def tile_product(
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
        launches = (work(1, 0), response_work(p, tiles), work(2, 2))
    config = {"plan": "fused", "BM": bm, "BC": bc, "PIECES": count, "BH": bh, "num_warps": warps, "num_stages": 2}
    return Candidate(f"fused-m{bm}-h{bh}-w{warps}", config, launches)


def tile_config(bm: int, bn: int, bk: int, warps: int, stages: int = 2) -> dict:
    """A matmul kernel's configuration."""
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}


def tile_name(tile: dict) -> str:
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


def _product_tiles(p: Problem) -> Iterator[dict]:
    """The tiles of `mlp_folded_expand_kernel` and `mlp_project_kernel`."""
    if p.rounded:
        yield from (tile_config(*tile) | {"GROUP": 1} for tile in TF32_TILES)
        return
    for tile in (*SMALL_TILES, *LARGE_TILES):
        yield tile_config(*tile) | {"GROUP": GROUP if tile in LARGE_TILES else 1}


def _tma_tiles(p: Problem, gpu: tuning.Gpu) -> Iterator[dict]:
    """Tiles of `mlp_project_kernel` whose operands are loaded by TMA."""
    if not described(p, gpu):
        return
    yield tile_config(*TMA_TILE) | {"GROUP": 1, "TMA": 1}
    if p.channels % 128 == 0:  # a tail spills on sm_100
        yield tile_config(*TMA_LARGE_TILE) | {"GROUP": GROUP, "TMA": 1}
        if p.stream_itemsize == 2 and gpu.arch in SPECIALISED_TILES:  # beside an fp32 residual it spills 2688 bytes
            yield tile_config(*SPECIALISED_TILES[gpu.arch]) | {"GROUP": GROUP, "TMA": 2}


def expand_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to compute the hidden from x."""
    element, hidden = p.channels * p.itemsize, p.hidden * p.compute_itemsize
    weights, written = float(p.channels * hidden), hidden * (1 + p.keeps_hidden)

    def product(tile: dict, input_ops: float) -> Work:
        size = tile["BM"], tile["BN"]
        return tile_product(p, p.channels, p.hidden, *size, GELU_OPS, element, written, weights, input_ops=input_ops)

    for sizes in TF32_TILES if p.rounded else NORMALISING_TILES:
        tile = tile_config(*sizes)
        works = (product(tile, NORMALISE_OPS),)
        handicap = NORMALISING_HANDICAP if p.channels >= FOLDED_CHANNELS else 1.0
        yield Candidate(tile_name(tile), {"fold": False, "tile": tile}, works, handicap)
    if p.channels >= FOLDED_CHANNELS and not p.adaptive:
        folding = Work(dram_bytes=weights * 2, programs=-(-p.hidden // FOLD_ROWS))
        for tile in _product_tiles(p):
            works = folding, product(tile, FOLD_OPS)
            yield Candidate(f"fold-{tile_name(tile)}", {"fold": True, "tile": tile}, works)
    if not p.grn:
        yield Candidate(LIBRARY, {"library": True}, tuple(library_expand(p, gpu)), LIBRARY_HANDICAP)


def project_candidates(p: Problem, gpu: tuning.Gpu, library: bool = True) -> Iterator[Candidate]:
    """Every way to compute the result from the hidden; by the library only if `library`."""
    hidden, stream = p.hidden * p.compute_itemsize, p.channels * p.stream_itemsize
    weights = float(p.channels * hidden)
    for tile in ({"TMA": 0} | tile for tile in (*_product_tiles(p), *_tma_tiles(p, gpu))):
        if gpu.arch in (100, 103) and p.stream_itemsize == 4 and not p.rounded and tile["BM"] == 128:
            continue  # spills 80 bytes beside a 4-byte residual
        size = tile["BM"], tile["BN"]
        work = tile_product(p, p.hidden, p.channels, *size, 8, hidden, 2 * stream, weights)
        yield Candidate(tile_name(tile), {"tile": tile | {"SPLIT": 1}}, (work,))
        split = min(8, p.hidden // 256, gpu.sms // max(1, work.programs))
        if tile["BM"] == 64 and split > 1:  # batch 1 of late stages has few tiles
            tile = tile | {"SPLIT": split}
            sums = 4.0 * split * p.channels
            work = tile_product(p, p.hidden, p.channels, *size, 8, hidden, sums, weights, split=split)
            yield Candidate(tile_name(tile), {"tile": tile}, (work, pointwise(p, sums + 2 * stream)))
    if library and not p.grn:
        yield Candidate(LIBRARY, {"library": True}, tuple(library_project(p, gpu)), LIBRARY_HANDICAP)


def forward_candidates(p: Problem, gpu: tuning.Gpu) -> Iterator[Candidate]:
    """Every way to run the forward pass. The last one is two products, whose kernels are choices of their own."""
    # Not for V2 with the hidden kept: the launch for the sums spills on sm_100, and the fused plan would save little,
    # because the hidden is written anyway.
    tiles: tuple = ()
    if ours(p, gpu) and p.channels <= FUSED_CHANNELS and not (p.grn and p.keeps_hidden):
        tiles = tuple(_fused_tiles(p, gpu.arch))
    for tile in tiles:
        yield _fused(p, *tile)
    fused = bool(tiles)
    yield cublas(p, gpu, HANDICAP**2 if fused else HANDICAP)
    if ours(p, gpu):
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
        response = (response_work(p, p.tiles(expand.config["tile"]["BM"])),)
    config = {"plan": "gemm", "expand": expand.config, "project": project.config}
    return Candidate(name, config, (*expand.launches, *response, *project.launches), handicap)


def rounded_batch(p: Problem) -> Problem:
    """The problem with its batch rounded up to a power of two, so that batch 7 uses the kernels of batch 8."""
    return p._replace(samples=1 << (p.samples - 1).bit_length())


@tuning.remembered
def forward_plan(p: Problem, gpu: tuning.Gpu) -> Candidate:
    """The candidate that the forward pass runs."""
    p = rounded_batch(p)
    plan = tuning.pick("mlp_forward", p, tuple(forward_candidates(p, gpu)), gpu)
    if plan.config["plan"] != "gemm":
        return plan
    kernels = iter(("mlp_expand", "mlp_project"))
    return _products("", p, gpu, lambda candidates, gpu: tuning.pick(next(kernels), p, candidates, gpu))
