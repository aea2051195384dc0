// The operations in double precision, written from their formulas; they share no code with the kernels. Each
// result has an allowed error of fp32 (or bf16) arithmetic, which is derived from the sums themselves.
#pragma once

#include "support.h"

namespace cnk::test::reference {

constexpr double kUnit = 0x1p-24;  // rounding of fp32

struct Image {
  int64_t n, h, w, c;
  int64_t pixels() const { return n * h * w; }
  int64_t count() const { return pixels() * c; }
};

// A depthwise convolution, or the gradient of its input: Axis in cpu/ops.h.
struct Convolution {
  int kernel_h, kernel_w;
  int64_t dilation_h = 1, dilation_w = 1;
  int down = 1, up = 1;

  static Convolution square(int kernel_size, int64_t dilation) {
    return {kernel_size, kernel_size, dilation, dilation};
  }
  int64_t taps() const { return int64_t{kernel_h} * kernel_w; }
  // Of an input of `in` pixels; an input gradient has the most pixels that it can have.
  Axis axis(int64_t in, int kernel, int64_t dilation) const {
    return {in, down > 1 ? (in + 1) / 2 : in * up, kernel, dilation, down, up};
  }
  Axis h(const Image& s) const { return axis(s.h, kernel_h, dilation_h); }
  Axis w(const Image& s) const { return axis(s.w, kernel_w, dilation_w); }
  Image result(const Image& s) const { return {s.n, h(s).out, w(s).out, s.c}; }
};

// The pixel of the input that tap k of result o reads; negative if there is none.
inline int64_t from(const Axis& axis, int64_t o, int k) {
  const int64_t scaled = o * axis.down + (k - axis.taps / 2) * axis.dilation;
  if (scaled < 0 || scaled % axis.up || scaled / axis.up >= axis.in) return -1;
  return scaled / axis.up;
}

// weight (KH * KW, C). Bound: every term may be rounded once by the multiplication and once by the addition.
inline Expected dwconv(const Values& x, const Image& s, const Convolution& conv, const Values& weight,
                       const Values& bias) {
  const Image result = conv.result(s);
  Expected out{Values(result.count()), Values(result.count())};
  for (int64_t p = 0; p < result.pixels(); ++p) {
    const int64_t n = p / (result.h * result.w), h = p / result.w % result.h, w = p % result.w;
    double *value = &out.value[p * s.c], *size = &out.tolerance[p * s.c];
    for (int64_t c = 0; c < s.c; ++c) {
      value[c] = bias[c];
      size[c] = std::fabs(bias[c]);
    }
    for (int i = 0; i < conv.kernel_h; ++i) {
      for (int j = 0; j < conv.kernel_w; ++j) {
        const int64_t from_h = from(conv.h(s), h, i), from_w = from(conv.w(s), w, j);
        if (from_h < 0 || from_w < 0) continue;
        const double* pixel = &x[((n * s.h + from_h) * s.w + from_w) * s.c];
        const double* tap = &weight[(i * conv.kernel_w + j) * s.c];
        for (int64_t c = 0; c < s.c; ++c) {
          value[c] += pixel[c] * tap[c];
          size[c] += std::fabs(pixel[c] * tap[c]);
        }
      }
    }
    for (int64_t c = 0; c < s.c; ++c) size[c] *= 2 * kUnit * double(conv.taps() + 2);
  }
  return out;
}

// x (rows, C) with errors up to `x_tolerance` (empty: none).
// The rounding of the sums grows with the square root of C.
inline Expected layernorm(const Values& x, const Values& x_tolerance, int64_t c, const Values& weight,
                          const Values& bias, double eps) {
  Expected out{Values(x.size()), Values(x.size())};
  const double unit = kUnit * (8 + std::sqrt(double(c)));
  for (size_t row = 0; row < x.size(); row += c) {
    double mean = 0, variance = 0, largest = 0, error = 0;
    for (int64_t i = 0; i < c; ++i) {
      mean += x[row + i] / c;
      largest = std::max(largest, std::fabs(x[row + i]));
      if (!x_tolerance.empty()) error = std::max(error, x_tolerance[row + i]);
    }
    for (int64_t i = 0; i < c; ++i) variance += (x[row + i] - mean) * (x[row + i] - mean) / c;
    const double rstd = 1 / std::sqrt(variance + eps);
    for (int64_t i = 0; i < c; ++i) {
      const double scaled = (x[row + i] - mean) * rstd * weight[i];
      out.value[row + i] = scaled + bias[i];
      out.tolerance[row + i] = std::fabs(weight[i]) * rstd * (unit * largest + 2 * error) +
                               unit * (std::fabs(scaled) + std::fabs(bias[i]));
    }
  }
  return out;
}

// x (N, pixels, C) -> the factor of every (N, C): 1 + weight *
// G / (mean_c G + eps), with G = sqrt(sum over pixels of x^2).
inline Values grn_factors(const Values& x, int64_t n, int64_t pixels, int64_t c, const Values& weight,
                          double eps) {
  Values factors(n * c);
  for (int64_t image = 0; image < n; ++image) {
    double* g = &factors[image * c];
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t i = 0; i < c; ++i) {
        const double v = x[(image * pixels + p) * c + i];
        g[i] += v * v;
      }
    }
    double mean = 0;
    for (int64_t i = 0; i < c; ++i) mean += std::sqrt(g[i]) / c;
    for (int64_t i = 0; i < c; ++i) g[i] = 1 + weight[i] * std::sqrt(g[i]) / (mean + eps);
  }
  return factors;
}

// Bound: the sum of `pixels` squares, the mean of C roots.
inline Expected grn(const Values& x, int64_t n, int64_t pixels, int64_t c, const Values& weight,
                    const Values& bias, double eps) {
  Expected out{Values(x.size()), Values(x.size())};
  const Values factors = grn_factors(x, n, pixels, c, weight, eps);
  for (size_t k = 0; k < x.size(); ++k) {
    const int64_t i = k % c, image = k / (pixels * c);
    const double scaled = x[k] * factors[image * c + i], change = x[k] * (factors[image * c + i] - 1);
    out.value[k] = scaled + bias[i];
    out.tolerance[k] =
        kUnit * ((pixels + c) * std::fabs(change) + 4 * std::fabs(scaled) + 4 * std::fabs(bias[i]));
  }
  return out;
}

inline double gelu(double x) { return x * 0.5 * std::erfc(-x * std::sqrt(0.5)); }

// w as the products use it.
inline Values operand(const Values& w, Products products) {
  return products == Products::kFloat32 ? w : Tensor(DType::kBFloat16, w).values();
}

inline double norm(const double* v, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += v[i] * v[i];
  return std::sqrt(sum);
}
inline double largest(const Values& v) {
  double most = 0;
  for (double e : v) most = std::max(most, std::fabs(e));
  return most;
}

// Typical relative error of one operand or sum of a product:
// half of bf16's rounding; for fp32 a chain of 256 roundings.
inline double product_unit(Products products) { return products == Products::kFloat32 ? 16 * kUnit : 0x1p-9; }

// out[j] += sum_i in[i] w[j, i] for a weight (rows, columns) that is passed transposed.
inline void multiply(const double* in, const Values& transposed, int64_t inputs, int64_t outputs,
                     double* out) {
  for (int64_t i = 0; i < inputs; ++i) {
    const double v = in[i], *row = &transposed[i * outputs];
    for (int64_t j = 0; j < outputs; ++j) out[j] += v * row[j];
  }
}
inline Values transpose(const Values& w, int64_t rows, int64_t columns) {
  Values out(w.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = w[i * columns + j];
  }
  return out;
}

struct Mlp {
  Products products;
  int64_t n, pixels, c, hidden;
  const Values &w1, &b1, &w2, &b2, &gamma;  // (hidden, C), hidden, (C, hidden), C, C
  const Values& grn_weight;                 // hidden, or empty
  double grn_eps;
  const Values &residual, &drop_scale;  // like the output, N; or empty
};

// y (N, pixels, C), normalised. Errors of single operands and sums are independent of each other, so their
// total is the root of the sum of their squares; six times that is allowed.
inline Expected mlp(const Expected& y, const Mlp& m) {
  const Values w1 = transpose(operand(m.w1, m.products), m.hidden, m.c);
  const Values w2 = transpose(operand(m.w2, m.products), m.c, m.hidden);
  const double unit = product_unit(m.products), most1 = largest(w1), most2 = largest(w2);
  const int64_t rows = m.n * m.pixels;
  Values h(rows * m.hidden), u(m.hidden);
  for (int64_t p = 0; p < rows; ++p) {
    u = m.b1;
    multiply(&y.value[p * m.c], w1, m.c, m.hidden, u.data());
    for (int64_t j = 0; j < m.hidden; ++j) h[p * m.hidden + j] = gelu(u[j]);
  }
  Values factors;
  double factor = 1, relative = unit;
  if (!m.grn_weight.empty()) {
    factors = grn_factors(h, m.n, m.pixels, m.hidden, m.grn_weight, m.grn_eps);
    factor = largest(factors);
    relative = 2 * unit + kUnit * std::sqrt(double(m.pixels));
    for (int64_t k = 0; k < rows * m.hidden; ++k)
      h[k] *= factors[k / (m.pixels * m.hidden) * m.hidden + k % m.hidden];
  }
  Expected out{Values(rows * m.c), Values(rows * m.c)};
  Values sum(m.c);
  for (int64_t p = 0; p < rows; ++p) {
    sum = m.b2;
    multiply(&h[p * m.hidden], w2, m.hidden, m.c, sum.data());
    const double y_error = unit * norm(&y.value[p * m.c], m.c) + norm(&y.tolerance[p * m.c], m.c);
    const double u_error =
        1.13 * (y_error * most1 + unit * largest(m.b1));  // 1.13: the steepest slope of GELU
    const double h_error = std::hypot(std::sqrt(double(m.hidden)) * factor * std::hypot(u_error, 5e-7),
                                      relative * norm(&h[p * m.hidden], m.hidden));
    const double drop = m.drop_scale.empty() ? 1 : m.drop_scale[p / m.pixels];
    for (int64_t c = 0; c < m.c; ++c) {
      const double scale = m.gamma[c] * drop, residual = m.residual.empty() ? 0 : m.residual[p * m.c + c];
      out.value[p * m.c + c] = residual + scale * sum[c];
      out.tolerance[p * m.c + c] = std::fabs(scale) * 6 * most2 * h_error +
                                   4 * kUnit * (std::fabs(scale) * std::fabs(sum[c]) + std::fabs(residual));
    }
  }
  return out;
}

}  // namespace cnk::test::reference
