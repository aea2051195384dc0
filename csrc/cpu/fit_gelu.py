"""Fit the polynomials of gelu.h: run it, paste what it prints. Needs numpy and scipy.

gelu(x) = max(x, 0) - a * 2^P(a) with a = min(|x|, A): a * 2^P(a) = a * Phi(-a), so P(a) = log2 Phi(-a). P is fitted
in the minimax sense on the error that counts, a * (2^P - Phi(-a)), by iteratively reweighted least squares, and 2^f
on [-0.5, 0.5] by Chebyshev interpolation of the relative error. GELU's derivative needs Phi itself, also at 0, where
GELU forgives everything: for that the error that counts is max(a, 1) * (2^P - Phi(-a)). The maximum errors printed
are of fp32 evaluation.
"""

import sys

import numpy as np
from scipy.special import erf, log_ndtr, ndtr

LIMIT = 6.0


def fit_log2_cdf(degree: int, least: float) -> np.ndarray:
    """Return the coefficients of P, constant first, for the error max(a, least) * (2^P - Phi(-a))."""
    a = (1 - np.cos(np.linspace(0, np.pi, 6001))) * LIMIT / 2
    target = log_ndtr(-a) / np.log(2)
    factor = np.maximum(a, least)
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


def evaluate(coefficients: np.ndarray, exp2: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate gelu and Phi as the kernels do, in fp32 with fused multiply-adds."""
    f32 = np.float32
    a = np.minimum(np.abs(x), f32(LIMIT))
    p = np.full_like(a, f32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        p = (p.astype(np.float64) * a + f32(c)).astype(f32)  # fused multiply-add
    i = np.rint(p)
    f = p - i
    q = np.full_like(a, f32(exp2[-1]))
    for c in exp2[-2::-1]:
        q = (q.astype(np.float64) * f + f32(c)).astype(f32)
    q = np.ldexp(q, i.astype(np.int32))
    gelu = (np.maximum(x, f32(0)).astype(np.float64) - a.astype(np.float64) * q).astype(f32)
    return gelu, np.where(x > 0, f32(1) - q, q)


def main() -> None:
    """Print coefficients and errors for several degrees."""
    x = np.concatenate([np.linspace(-8, 8, 2_000_001), np.linspace(-0.01, 0.01, 200_001)]).astype(np.float32)
    exact = x.astype(np.float64) * 0.5 * (1 + erf(x.astype(np.float64) / np.sqrt(2)))
    for least in (0.0, 1.0):
        for degree, exp2_degree in ((9, 5), (8, 5), (7, 5), (6, 5), (5, 4), (4, 3), (3, 3)):
            p, e = fit_log2_cdf(degree, least), fit_exp2(exp2_degree)
            gelu, cdf = evaluate(p, e, x)
            error = np.abs(gelu - exact)
            relative = error / np.maximum(np.abs(exact), 1e-3)
            print(f"log2 cdf degree {degree}, 2^f degree {exp2_degree}, for max(a, {least:g}):")
            print(
                f"  max abs {error.max():.2e}, relative {relative.max():.2e}, of Phi {np.abs(cdf - ndtr(x)).max():.2e}"
            )
            print("  P  =", ", ".join(f"{np.float32(c):.9g}f" for c in p))
            print("  2^f=", ", ".join(f"{np.float32(c):.9g}f" for c in e))


if __name__ == "__main__":
    main()
