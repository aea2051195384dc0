"""Fit the numbers of gelu.h: run it, paste what it prints. Needs numpy and scipy.

gelu(x) = max(x, 0) - a * Phi(-a) with a = min(|x|, 6). GELU's derivative needs Phi itself, also at 0, where GELU
forgives everything: the error that counts is max(a, 1) times Phi's.

Before rounding to bf16, with AVX-512, Phi(-a) is a quadratic in a, in each of 32 segments of [0, 4.8]: 2^-17 x, where
rounding is 2^-9 of the result.

Else, with AVX-512, Phi(-a) is a cubic in each of 32 segments around a = 0, 6/31, ..., 6, by Chebyshev interpolation in
d = 31/6 a - segment. Elsewhere it is 2^P(a), P fitted in the minimax sense by iteratively reweighted least squares, and
2^f on [-0.5, 0.5] a polynomial by Chebyshev interpolation of the relative error. The largest errors printed are of
evaluation in fp32.
"""

import sys

import numpy as np
from scipy.special import log_ndtr, ndtr

LIMIT = 6.0
ROUGH_LIMIT = 4.8
SEGMENTS = 32


def fit_table() -> np.ndarray:
    """Return the coefficients of the cubics, (4, segments), constants first."""
    nodes = np.cos(np.pi * (np.arange(4) + 0.5) / 4) / 2
    a = (np.arange(SEGMENTS)[:, None] + nodes) * LIMIT / (SEGMENTS - 1)
    return np.linalg.solve(np.vander(nodes, increasing=True), ndtr(-a).T)


def fit_rough_table() -> np.ndarray:
    """Return the coefficients of the quadratics, (3, segments), constants first, of powers of a itself."""
    nodes = np.cos(np.pi * (np.arange(3) + 0.5) / 3) / 2
    a = (np.arange(SEGMENTS)[:, None] + nodes) * ROUGH_LIMIT / (SEGMENTS - 1)
    table = np.stack([np.linalg.solve(np.vander(row, increasing=True), ndtr(-row)) for row in a], 1)
    table[:, -1] = 0  # of the largest negative numbers GELU is 0
    return table


def fit_log2_cdf(degree: int) -> np.ndarray:
    """Return the coefficients of P, constant first."""
    a = (1 - np.cos(np.linspace(0, np.pi, 6001))) * LIMIT / 2
    target = log_ndtr(-a) / np.log(2)
    factor = np.maximum(a, 1)
    sensitivity = np.maximum(factor * ndtr(-a), 1e-9)  # d(a 2^P) = a 2^P ln2 dP
    vandermonde = np.vander(a / LIMIT, degree + 1, increasing=True)
    weight = np.ones_like(a)
    best, best_error = None, np.inf
    for _ in range(400):
        scale = sensitivity * np.sqrt(weight)
        coefficients, *_ = np.linalg.lstsq(vandermonde * scale[:, None], target * scale, rcond=None)
        error = np.abs(factor * (2.0 ** (vandermonde @ coefficients) - ndtr(-a)))
        if error.max() < best_error:
            best, best_error = coefficients.copy(), error.max()
        weight *= (error / error.max() + 1e-3) ** 0.5
        weight /= weight.mean()
    print(f"// degree {degree}: {best_error:.2e} in exact arithmetic", file=sys.stderr)
    return best / LIMIT ** np.arange(degree + 1)


def fit_exp2(degree: int) -> np.ndarray:
    """Return the coefficients of 2^f, constant first."""
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) / 2
    return np.linalg.solve(np.vander(nodes, degree + 1, increasing=True), 2.0**nodes)


def horner(coefficients: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Evaluate in fp32 with fused multiply-adds; coefficients (degree + 1, ...), constant first."""
    p = np.broadcast_to(coefficients[-1].astype(np.float32), v.shape)
    for c in coefficients[-2::-1]:
        p = (p.astype(np.float64) * v + c.astype(np.float32)).astype(np.float32)
    return p


def tail_by_table(table: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Phi(-a) as the kernels for AVX-512 do it."""
    scaled = a.astype(np.float64) * np.float32((SEGMENTS - 1) / LIMIT)
    segment = np.rint(scaled).astype(np.int64)
    return horner(table[:, segment], (scaled - segment).astype(np.float32))


def rough_tail(table: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Phi(-a) as the kernels for AVX-512 do it before they round to bf16."""
    segment = np.rint(a.astype(np.float64) * np.float32((SEGMENTS - 1) / ROUGH_LIMIT)).astype(np.int64)
    return horner(table[:, segment], a)


def tail_by_exp2(p: np.ndarray, e: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Phi(-a) as the other kernels do it."""
    v = horner(p, a)
    return np.ldexp(horner(e, v - np.rint(v)), np.rint(v).astype(np.int32))


def report(name: str, tail: np.ndarray, a: np.ndarray, x: np.ndarray) -> None:
    """Print the largest errors of GELU and of Phi."""
    exact = x.astype(np.float64) * ndtr(x.astype(np.float64))
    gelu = (np.maximum(x, np.float32(0)).astype(np.float64) - a.astype(np.float64) * tail).astype(np.float32)
    cdf = np.where(x > 0, np.float32(1) - tail, tail)
    print(f"{name}: GELU {np.abs(gelu - exact).max():.2e}, Phi {np.abs(cdf - ndtr(x)).max():.2e}")


def show(name: str, numbers: np.ndarray) -> None:
    """Print fp32 constants as C++ has them."""
    print(f"  {name}:", ", ".join(f"{np.float32(c):.9g}f" for c in numbers))


def main() -> None:
    """Print the table, and polynomials of several degrees."""
    x = np.concatenate([np.linspace(-8, 8, 2_000_001), np.linspace(-0.01, 0.01, 200_001)]).astype(np.float32)
    a = np.minimum(np.abs(x), np.float32(LIMIT))
    table = fit_table()
    report(f"{SEGMENTS} cubics", tail_by_table(table, a), a, x)
    for power, row in enumerate(table):
        show(f"d^{power}", row)
    rough_a, rough = np.minimum(np.abs(x), np.float32(ROUGH_LIMIT)), fit_rough_table()
    report(f"{SEGMENTS} quadratics", rough_tail(rough, rough_a), rough_a, x)
    for power, row in enumerate(rough):
        show(f"a^{power}", row)
    for degree, exp2_degree in ((8, 5), (7, 5), (6, 5), (6, 4)):
        p, e = fit_log2_cdf(degree), fit_exp2(exp2_degree)
        report(f"log2 of degree {degree}, 2^f of degree {exp2_degree}", tail_by_exp2(p, e, a), a, x)
        show("P", p)
        show("2^f", e)


if __name__ == "__main__":
    main()
