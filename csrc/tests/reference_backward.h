// The gradients in double precision, written from their formulas; they share no code with the kernels.
//
// Each sum has the root of the sum of its squared terms beside it. Roundings of single terms are independent
// of each other, so their total is this root times the rounding of one term. The tests allow a multiple of
// it, far below the share that one forgotten row or column has in a sum.
#pragma once

#include "reference.h"

namespace cnk::test::reference {

// Many sums of products.
class Sums {
 public:
  explicit Sums(int64_t count) : value_(count), squares_(count) {}
  // `doubt`: the size of the term if nothing in its factors cancelled.
  void add(int64_t i, double term, double doubt = 0) {
    value_[i] += term;
    squares_[i] += (std::fabs(term) + doubt) * (std::fabs(term) + doubt);
  }
  const Values& value() const { return value_; }
  double terms(int64_t i) const { return std::sqrt(squares_[i]); }
  // Times factor[i / each].
  Expected within(double relative, const Values& factor = {}, int64_t each = 1) const {
    Expected out{value_, Values(value_.size())};
    double most = 0;  // factors that nearly cancel have errors as large as the others
    for (size_t i = 0; i < value_.size(); ++i) most = std::max(most, terms(i));
    for (size_t i = 0; i < value_.size(); ++i) {
      const double f = factor.empty() ? 1 : factor[i / each];
      out.value[i] *= f;
      out.tolerance[i] = relative * (most / 2 + terms(i) + std::fabs(value_[i])) * std::fabs(f);
    }
    return out;
  }

 private:
  Values value_, squares_;
};

struct DwconvGradient {
  Sums weight, bias;  // (KH * KW, C), C
};

inline DwconvGradient dwconv_gradient(const Values& x, const Values& dy, const Image& s,
                                      const Convolution& conv) {
  DwconvGradient out{Sums(conv.taps() * s.c), Sums(s.c)};
  const Image result = conv.result(s);
  for (int64_t p = 0; p < result.pixels(); ++p) {
    const int64_t n = p / (result.h * result.w), h = p / result.w % result.h, w = p % result.w;
    for (int64_t c = 0; c < s.c; ++c) out.bias.add(c, dy[p * s.c + c]);
    for (int i = 0; i < conv.kernel_h; ++i) {
      for (int j = 0; j < conv.kernel_w; ++j) {
        const int64_t from_h = from(conv.h(s), h, i), from_w = from(conv.w(s), w, j);
        if (from_h < 0 || from_w < 0) continue;
        const double* pixel = &x[((n * s.h + from_h) * s.w + from_w) * s.c];
        for (int64_t c = 0; c < s.c; ++c)
          out.weight.add((i * conv.kernel_w + j) * s.c + c, dy[p * s.c + c] * pixel[c]);
      }
    }
  }
  return out;
}

struct LayernormGradient {
  Expected x;
  Sums weight, bias;
};

// x, dy (rows, C). dy_terms: the roots of the squared terms of dy if dy is a result itself, else empty.
// Errors of dy are `relative` times these.
inline LayernormGradient layernorm_gradient(const Values& x, const Values& dy, const Values& dy_terms,
                                            int64_t c, const Values& weight, double eps, double relative) {
  LayernormGradient out{{Values(x.size()), Values(x.size())}, Sums(c), Sums(c)};
  for (size_t row = 0; row < x.size(); row += c) {
    double mean = 0, variance = 0, most = 0, most_g = 0, mean_g = 0, mean_gx = 0;
    for (int64_t i = 0; i < c; ++i) {
      mean += x[row + i] / c;
      most = std::max(most, std::fabs(x[row + i]));
    }
    for (int64_t i = 0; i < c; ++i) variance += (x[row + i] - mean) * (x[row + i] - mean) / c;
    const double rstd = 1 / std::sqrt(variance + eps);
    for (int64_t i = 0; i < c; ++i) {
      const double g = dy[row + i] * weight[i], xhat = (x[row + i] - mean) * rstd;
      const double doubt = dy_terms.empty() ? 0 : dy_terms[row + i];
      mean_g += g / c;
      mean_gx += g * xhat / c;
      most_g = std::max(most_g, std::fabs(g) + doubt * std::fabs(weight[i]));
      // fp32 subtracts the mean: kUnit * most * rstd of error in xhat.
      out.weight.add(i, dy[row + i] * xhat,
                     doubt * std::fabs(xhat) +
                         std::fabs(dy[row + i]) * most * rstd * std::min(1.0, 32 * kUnit / relative));
      out.bias.add(i, dy[row + i], doubt);
    }
    for (int64_t i = 0; i < c; ++i) {
      const double g = dy[row + i] * weight[i], xhat = (x[row + i] - mean) * rstd;
      out.x.value[row + i] = rstd * (g - mean_g - xhat * mean_gx);
      out.x.tolerance[row + i] = rstd * most_g * (relative * 2 + 64 * kUnit * most * rstd);
    }
  }
  return out;
}

struct GrnGradient {
  Values x;
  Sums weight, bias;
};

// x, dy (N, pixels, C).
inline GrnGradient grn_gradient(const Values& x, const Values& dy, int64_t n, int64_t pixels, int64_t c,
                                const Values& weight, double eps) {
  GrnGradient out{Values(x.size()), Sums(c), Sums(c)};
  for (int64_t image = 0; image < n; ++image) {
    const int64_t start = image * pixels * c;
    Values g(c), cross(c);
    double mean = 0, projection = 0;
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t p = 0; p < pixels; ++p) {
        const double v = x[start + p * c + i], d = dy[start + p * c + i];
        g[i] += v * v;
        cross[i] += d * v;
      }
      g[i] = std::sqrt(g[i]);
      mean += g[i] / c;
      projection += weight[i] * cross[i] * g[i] / c;
    }
    const double s = mean + eps;
    for (int64_t i = 0; i < c; ++i) {
      const double dg = weight[i] * cross[i] / s - projection / (s * s);
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t at = start + p * c + i;
        out.x[at] = dy[at] * (1 + weight[i] * g[i] / s) + (g[i] == 0 ? 0 : x[at] * dg / g[i]);
        out.weight.add(i, dy[at] * x[at] * g[i] / s);
        out.bias.add(i, dy[at]);
      }
    }
  }
  return out;
}

inline double gelu_slope(double x) {
  return 0.5 * std::erfc(-x * std::sqrt(0.5)) + x * std::exp(-0.5 * x * x) * 0.39894228040143267794;
}

struct MlpBackward {
  int64_t n, pixels, c, hidden;
  const Values &x, &dout;                            // (N, pixels, C)
  const Values &norm_weight, &norm_bias;             // C
  const Values &w1, &b1, &w2, &b2, &gamma;           // (hidden, C), hidden, (C, hidden), C, C
  const Values &grn_weight, &grn_bias, &drop_scale;  // hidden, hidden, N; or empty
  const Values& kept;                                // u (N, pixels, hidden), or empty: W1 LN(x) + b1
  double eps, grn_eps;
};

struct MlpGradient {
  Expected x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, grn_weight, grn_bias;
};

// u of all rows.
inline Values mlp_hidden(const MlpBackward& m) {
  const Expected z = layernorm(m.x, {}, m.c, m.norm_weight, m.norm_bias, m.eps);
  const Values w1 = transpose(m.w1, m.hidden, m.c);
  Values u(m.n * m.pixels * m.hidden), row;
  for (int64_t p = 0; p < m.n * m.pixels; ++p) {
    row = m.b1;
    multiply(&z.value[p * m.c], w1, m.c, m.hidden, row.data());
    std::copy(row.begin(), row.end(), u.begin() + p * m.hidden);
  }
  return u;
}

inline MlpGradient mlp_gradient(const MlpBackward& m, double relative) {
  const int64_t rows = m.n * m.pixels, c = m.c, hidden = m.hidden;
  const bool grn = !m.grn_weight.empty();
  const Values z = layernorm(m.x, {}, c, m.norm_weight, m.norm_bias, m.eps).value;
  const Values u = m.kept.empty() ? mlp_hidden(m) : m.kept;
  Values e = m.dout, h(u.size()), dg(u.size());
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t i = 0; i < c; ++i) e[p * c + i] *= m.drop_scale.empty() ? 1 : m.drop_scale[p / m.pixels];
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < hidden; ++j)
        dg[p * hidden + j] += m.gamma[i] * e[p * c + i] * m.w2[i * hidden + j];
    for (int64_t j = 0; j < hidden; ++j) h[p * hidden + j] = gelu(u[p * hidden + j]);
  }
  Values g = h, dh = dg;
  MlpGradient out;
  if (grn) {
    const Values factors = grn_factors(h, m.n, m.pixels, hidden, m.grn_weight, m.grn_eps);
    for (size_t k = 0; k < h.size(); ++k) {
      const int64_t j = k % hidden, image = k / (m.pixels * hidden);
      g[k] = h[k] * factors[image * hidden + j] + m.grn_bias[j];
    }
    const GrnGradient back = grn_gradient(h, dg, m.n, m.pixels, hidden, m.grn_weight, m.grn_eps);
    dh = back.x;
    out.grn_weight = back.weight.within(relative);
    out.grn_bias = back.bias.within(relative);
  }
  Sums w1(hidden * c), b1(hidden), g2(c * hidden), of_e(c), gamma(c);
  Values dz(rows * c), dz_terms(rows * c);
  for (int64_t p = 0; p < rows; ++p) {
    Sums back(c);
    for (int64_t j = 0; j < hidden; ++j) {
      const int64_t k = p * hidden + j;
      const double du = dh[k] * gelu_slope(u[k]);
      b1.add(j, du);
      for (int64_t i = 0; i < c; ++i) {
        w1.add(j * c + i, du * z[p * c + i]);
        g2.add(i * hidden + j, e[p * c + i] * g[k]);
        gamma.add(i, e[p * c + i] * g[k] * m.w2[i * hidden + j]);
        back.add(i, du * m.w1[j * c + i]);
      }
    }
    for (int64_t i = 0; i < c; ++i) {
      of_e.add(i, e[p * c + i]);
      gamma.add(i, m.b2[i] * e[p * c + i]);
      dz[p * c + i] = back.value()[i];
      dz_terms[p * c + i] = back.terms(i);
    }
  }
  LayernormGradient norm = layernorm_gradient(m.x, dz, dz_terms, c, m.norm_weight, m.eps, relative);
  out.x = norm.x;
  out.norm_weight = norm.weight.within(relative);
  out.norm_bias = norm.bias.within(relative);
  out.w1 = w1.within(relative);
  out.b1 = b1.within(relative);
  out.w2 = g2.within(relative, m.gamma, hidden);
  out.b2 = of_e.within(relative, m.gamma);
  out.gamma = gamma.within(relative);
  return out;
}

}  // namespace cnk::test::reference
