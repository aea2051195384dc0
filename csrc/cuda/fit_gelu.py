"""Fit the polynomial of gelu.h and backends/triton/kernels/gelu.py: run it, paste what it prints.

Needs numpy and scipy.

gelu(x) = max(x, 0) - a * 2^P(a) with a = min(|x|, 6). P of degree 6 is fitted in the minimax sense on the error that
counts, max(a, 1/2) * |2^P(a) - Phi(-a)| on [0, 6], by iteratively reweighted least squares: times a it is the error of
gelu, times 1 that of gelu', and with 1/2 both come out alike (without it, gelu' is 8 times worse at 0).
csrc/cpu/fit_gelu.py fits the CPU kernels' polynomials the same way. The errors printed are of fp32 evaluation with
fused multiply-adds and an exact 2^p (a GPU's ex2.approx is within 2 units in the last place).
"""

import numpy as np
from scipy.special import log_ndtr, ndtr

LIMIT = 6.0
DEGREE = 6


def fit() -> np.ndarray:
    """Return the fp32 coefficients of P, constant first."""
    a = (1 - np.cos(np.linspace(0, np.pi, 6001))) * LIMIT / 2
    target = log_ndtr(-a) / np.log(2)
    vandermonde = np.vander(a / LIMIT, DEGREE + 1, increasing=True)
    factor = np.maximum(a, 0.5)
    sensitivity = np.maximum(factor * ndtr(-a), 1e-9)  # d(2^P) = 2^P ln2 dP
    weight = np.ones_like(a)
    best, best_error = None, np.inf
    for _ in range(1000):
        scale = sensitivity * np.sqrt(weight)
        coefficients, *_ = np.linalg.lstsq(vandermonde * scale[:, None], target * scale, rcond=None)
        error = factor * np.abs(2.0 ** (vandermonde @ coefficients) - ndtr(-a))
        if error.max() < best_error:
            best, best_error = coefficients, error.max()
        weight *= (error / error.max() + 1e-3) ** 0.5
        weight /= weight.mean()
    return (best / LIMIT ** np.arange(DEGREE + 1)).astype(np.float32)


def errors(coefficients: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Largest absolute errors of gelu and gelu' over fp32 x."""
    a = np.minimum(np.abs(x), np.float32(LIMIT))
    p = np.full_like(a, coefficients[-1])
    for c in coefficients[-2::-1]:
        p = (p.astype(np.float64) * a + np.float64(c)).astype(np.float32)
    q = np.exp2(p.astype(np.float64)).astype(np.float32)
    value = (np.maximum(x, 0).astype(np.float64) - a.astype(np.float64) * q).astype(np.float32)
    cdf = np.where(x > 0, np.float32(1) - q, q)
    density = (np.float32(0.3989422804014327) * np.exp2(x * x * np.float32(-0.7213475204444817))).astype(np.float32)
    derivative = (x.astype(np.float64) * density + cdf).astype(np.float32)
    wide = x.astype(np.float64)
    exact = ndtr(wide) + wide * np.exp(-wide * wide / 2) / np.sqrt(2 * np.pi)
    return np.abs(value - wide * ndtr(wide)).max(), np.abs(derivative - exact).max()


def main() -> None:
    """Print the coefficients and their errors."""
    x = np.concatenate([np.linspace(-8, 8, 2_000_001), np.linspace(-0.01, 0.01, 200_001)]).astype(np.float32)
    coefficients = fit()
    value, derivative = errors(coefficients, x)
    print(f"max error of gelu {value:.2e}, of gelu' {derivative:.2e}; coefficients, constant first:")
    for c in coefficients:
        print(f"    {float(c)!r}")


if __name__ == "__main__":
    main()
