"""Functions that the bottleneck's kernels share: LayerNorm of a tile in registers, and the output of the second matmul.

A row of C channels is divided into PIECES tiles of BC columns; BC is a power of two, as Triton requires: 96 = 3 x 32,
192 = 3 x 64. One tile of the next power of two would take 1.33 times the tensor core work.
"""

import triton
import triton.language as tl

from convnext_kernels.backends.triton.kernels.pixels import offsets


@triton.jit
def grouped(COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The (tile of pixels, tile of columns) of this program; axis 0 of the grid has COLUMNS programs for each tile.

    Programs that run at the same time share rows with GROUP 1, else the weights of a column: GROUP tiles of pixels.
    """
    at = tl.program_id(0)
    if GROUP == 1:
        tile = at // COLUMNS
        column = at % COLUMNS
    else:
        first = at // (GROUP * COLUMNS) * GROUP
        size = tl.minimum(tl.num_programs(0) // COLUMNS - first, GROUP)
        within = at % (GROUP * COLUMNS)
        tile = first + within % size
        column = within // size
    return tile, column


@triton.jit
def program_tile(pixels, tiles, OUTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(tile of pixels, its sample, its pixels, whether they exist, the columns of OUTER) of this program."""
    tile, column = grouped((OUTER + BN - 1) // BN, GROUP)
    n = tile // tiles
    p = (tile % tiles) * BM + tl.arange(0, BM)
    return tile, n, p, p < pixels, column * BN + tl.arange(0, BN)


@triton.jit
def described(ptr, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A tensor descriptor of a dense (rows, COLUMNS): loads of (ROWS, WIDTH) by TMA, 0 outside. 16-byte aligned."""
    return tl.make_tensor_descriptor(ptr, [rows, COLUMNS], [COLUMNS, 1], [ROWS, WIDTH])


@triton.jit
def load_vector(ptr, c, inside):
    """A parameter's elements `c` in fp32, 0 outside."""
    return tl.load(ptr + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_matrix(ptr, r, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """W[r, c] of a dense (ROWS, COLUMNS) weight; with `WHOLE` all indices must be inside."""
    where = ptr + r[:, None] * COLUMNS + c[None, :]
    if WHOLE:
        return tl.load(where)
    return tl.load(where, mask=(r < ROWS)[:, None] & (c < COLUMNS)[None, :], other=0.0)


@triton.jit
def load_transposed(ptr, r, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """W[r, c]^T, (len(c), len(r)), of a dense (ROWS, COLUMNS) weight, for x W^T of a Linear."""
    where = ptr + r[None, :] * COLUMNS + c[:, None]
    if WHOLE:
        return tl.load(where)
    return tl.load(where, mask=(r < ROWS)[None, :] & (c < COLUMNS)[:, None], other=0.0)


@triton.jit
def zero_pieces(BM: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr):
    """Accumulators for whole rows, all 0."""
    pieces = ()
    for _ in tl.static_range(PIECES):
        pieces = pieces + (tl.zeros((BM, BC), dtype=tl.float32),)
    return pieces


@triton.jit
def load_pieces(
    ptr, n, p, inside, stride_n, stride_p, stride_c, C: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr
):
    """The rows of a tile, in the dtype of x; 0 outside."""
    pieces = ()
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        where = offsets(n, p, c, stride_n, stride_p, stride_c)
        pieces = pieces + (tl.load(ptr + where, mask=inside[:, None] & (c < C)[None, :], other=0.0),)
    return pieces


@triton.jit
def normalise_pieces(pieces, eps, C: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr, NORM: tl.constexpr):
    """Return (xhat of every piece in fp32, their slopes, rstd), as `normalise` in layernorm.py."""
    if NORM == "rms":
        squares = tl.sum(pieces[0].to(tl.float32) * pieces[0].to(tl.float32), axis=1)
        for j in tl.static_range(1, PIECES):
            squares += tl.sum(pieces[j].to(tl.float32) * pieces[j].to(tl.float32), axis=1)
        rstd = tl.rsqrt(squares / C + eps)
        slope = ()
    else:
        slope, rstd = centre_pieces(pieces, eps, C, BC, PIECES, NORM)
    if NORM == "layer":
        xhat = slope
    else:
        xhat = ()
        for j in tl.static_range(PIECES):
            xhat = xhat + (pieces[j].to(tl.float32) * rstd[:, None],)
        if NORM == "rms":
            slope = xhat
    return xhat, slope, rstd


@triton.jit
def centre_pieces(pieces, eps, C: tl.constexpr, BC: tl.constexpr, PIECES: tl.constexpr, NORM: tl.constexpr):
    """Return ((x - mean) * rstd of every piece in fp32, rstd); two passes, with a corrected mean as in layernorm.py."""
    mean = tl.sum(pieces[0].to(tl.float32), axis=1)
    for j in tl.static_range(1, PIECES):
        mean += tl.sum(pieces[j].to(tl.float32), axis=1)
    mean = mean / C
    first = tl.zeros_like(mean)
    second = tl.zeros_like(mean)
    for j in tl.static_range(PIECES):
        d = pieces[j].to(tl.float32) - mean[:, None]
        if C < PIECES * BC:
            d = tl.where((j * BC + tl.arange(0, BC) < C)[None, :], d, 0.0)
        first += tl.sum(d, axis=1)
        second += tl.sum(d * d, axis=1)
    correction = first / C
    variance = second / C - correction * correction
    variance = tl.where(variance < 0, 0.0, variance)
    if NORM == "simple":
        variance = variance * (C / (C - 1))
    rstd = tl.rsqrt(variance + eps)
    mean = mean + correction
    xhat = ()
    for j in tl.static_range(PIECES):
        xhat = xhat + ((pieces[j].to(tl.float32) - mean[:, None]) * rstd[:, None],)
    return xhat, rstd


@triton.jit
def normed_pieces(
    rows,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    PIECES: tl.constexpr,
    NORM: tl.constexpr,
):
    """The norm of rows in pieces, rounded to DTYPE and then to COMPUTE; columns past C are 0."""
    xhat, _, _ = normalise_pieces(rows, eps, C, BC, PIECES, NORM)
    pieces = ()
    for j in tl.static_range(PIECES):
        c = j * BC + tl.arange(0, BC)
        weight = load_vector(norm_weight_ptr, c, c < C)
        z = xhat[j] * weight[None, :]
        if norm_bias_ptr is not None:
            z += load_vector(norm_bias_ptr, c, c < C)[None, :]
        if C < PIECES * BC:
            z = tl.where((c < C)[None, :], z, 0.0)  # xhat is not 0 there, and may be NaN in a masked row
        pieces = pieces + (z.to(DTYPE).to(COMPUTE),)
    return pieces


@triton.jit
def store_output(z, parameters, residual, out, n, p, c, inside, sample_pixels, C: tl.constexpr):
    """Store out = residual + s * gamma * (z + bias) for a tile (pixels p, channels c) of fp32 sums z.

    And the residual, rounded to another dtype, if there is a pointer for it. parameters: the pointers of bias, gamma
    and s; residual: its pointer and three strides; out: its pointer, that of the rounded residual, and three strides.
    """
    bias_ptr, gamma_ptr, drop_scale_ptr = parameters
    residual_ptr, stride_rn, stride_rp, stride_rc = residual
    out_ptr, rounded_ptr, stride_on, stride_op, stride_oc = out
    mask = inside[:, None] & (c < C)[None, :]
    if bias_ptr is not None:
        z += load_vector(bias_ptr, c, c < C)[None, :]
    if gamma_ptr is not None:
        z *= load_vector(gamma_ptr, c, c < C)[None, :]
    if drop_scale_ptr is not None:
        z *= load_vector(drop_scale_ptr, n + p // sample_pixels, inside)[:, None]
    if residual_ptr is not None:
        where = offsets(n, p, c, stride_rn, stride_rp, stride_rc)
        added = tl.load(residual_ptr + where, mask=mask, other=0.0)
        z += added.to(tl.float32)
    where = offsets(n, p, c, stride_on, stride_op, stride_oc)
    if rounded_ptr is not None:
        tl.store(rounded_ptr + where, added.to(rounded_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + where, z.to(out_ptr.dtype.element_ty), mask=mask)
