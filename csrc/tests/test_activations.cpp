// The activations and their slopes against their formulas in double.

#include <doctest/doctest.h>

#include <functional>

#include "common/variants.h"
#include "support.h"

using namespace cnk;
using namespace cnk::test;

namespace {

double gelu(double x) { return x * 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double value(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x * sigmoid(1.702 * x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kMish:
      return x * std::tanh(std::log1p(std::exp(x)));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kRelu6:
      return std::min(std::max(x, 0.0), 6.0);
    case Activation::kHardswish:
      return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
  }
  return 0;
}

// [-16, 16) in steps of 2^-10, without the ends of linear pieces, where there is no slope.
std::vector<float> grid() {
  std::vector<float> x;
  for (int i = -(16 << 10); i < 16 << 10; ++i) x.push_back((float(i) + 0.5f) * 0x1p-10f);
  return x;
}

}  // namespace

// Far below half a unit in the last place of bf16 (2e-3 relative), except for tiny results.
TEST_CASE("GELU is within 5e-7 of x * Phi(x), and within 1.2e-4 relative plus 5e-7 where that is small") {
  // [-16, 16) in steps of 2^-13, and 200,000 floats of every exponent.
  std::vector<float> x;
  for (int i = -(16 << 13); i < 16 << 13; ++i) x.push_back(float(i) * 0x1p-13f);
  Random random(3);
  while (x.size() % 16 || x.size() < (32 << 13) + 200000) {
    const float v = bits_float(random.bits());
    if (std::isfinite(v)) x.push_back(v);
  }
  std::vector<float> y(x.size()), slope(x.size()), alone(x.size());
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    k.probe.activation(Activation::kGelu, x.data(), y.data(), slope.data(), alone.data(), int64_t(x.size()));
    double worst = 0, worst_relative = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = gelu(x[i]), error = std::fabs(y[i] - want);
      if (std::fabs(x[i]) < 16) worst = std::max(worst, error);
      if (!(error <= 1.2e-4 * std::fabs(want) + 5e-7)) worst_relative = error;
    }
    CHECK(worst < 5e-7);
    CHECK(worst_relative == 0);
    CHECK(alone == y);
  }
}

TEST_CASE("activations and their slopes are within 2e-6 of their formulas") {
  const std::vector<float> x = grid();
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (int i = 0; i < kActivations; ++i) {
      CAPTURE(kActivationNames[i]);
      std::vector<float> y(x.size()), slope(x.size()), alone(x.size());
      k.probe.activation(Activation(i), x.data(), y.data(), slope.data(), alone.data(), int64_t(x.size()));
      double worst = 0, worst_slope = 0;
      for (size_t j = 0; j < x.size(); ++j) {
        const double h = 1e-5, at = x[j];
        const double want = value(Activation(i), at);
        const double want_slope = (value(Activation(i), at + h) - value(Activation(i), at - h)) / (2 * h);
        worst = std::max(worst, std::fabs(y[j] - want) / (1 + std::fabs(want)));
        worst_slope = std::max(worst_slope, std::fabs(slope[j] - want_slope));
      }
      CHECK(worst < 1e-6);
      CHECK(worst_slope < 2e-6);
      CHECK(alone == y);
    }
  }
}

TEST_CASE("activations of NaN are NaN, of the largest floats finite") {
  constexpr float kMax = std::numeric_limits<float>::max();
  std::vector<float> x(16, 1.0f);
  x[0] = std::nanf(""), x[1] = kMax, x[2] = -kMax, x[3] = 1e30f, x[4] = -1e30f, x[5] = -100.0f, x[6] = 100.0f;
  x[8] = HUGE_VALF, x[9] = -HUGE_VALF;
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (int i = 0; i < kActivations; ++i) {
      CAPTURE(kActivationNames[i]);
      std::vector<float> y(16), slope(16), alone(16);
      k.probe.activation(Activation(i), x.data(), y.data(), slope.data(), alone.data(), 16);
      CHECK(std::isnan(y[0]));
      const bool bounded = Activation(i) == Activation::kRelu6;
      CHECK(y[1] == (bounded ? 6.0f : kMax));
      CHECK(y[3] == (bounded ? 6.0f : 1e30f));
      CHECK(y[6] == (bounded ? 6.0f : 100.0f));
      if (Activation(i) == Activation::kGelu) CHECK((y[8] == HUGE_VALF && std::fabs(y[9]) <= 7e-9f));
      for (int j : {2, 4, 5}) CHECK(std::fabs(y[j]) <= 7e-9f);
      CHECK(std::fabs(y[7] - value(Activation(i), 1.0)) < 1e-6);  // a neighbour of NaN is not touched
    }
  }
}
