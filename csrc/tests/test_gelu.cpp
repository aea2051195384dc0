// GELU against x * Phi(x) in double.

#include <doctest/doctest.h>

#include "reference_backward.h"

using namespace cnk;
using namespace cnk::test;

namespace {

using Gelu = void (*)(const float*, float*, int64_t);

std::vector<float> apply(Gelu gelu, const std::vector<float>& x) {
  REQUIRE(x.size() % 16 == 0);
  std::vector<float> y(x.size());
  gelu(x.data(), y.data(), int64_t(x.size()));
  return y;
}

// [-16, 16) in steps of 2^-13, and 200,000 floats of every exponent.
const std::vector<float>& grid() {
  static const std::vector<float> all = [] {
    std::vector<float> x;
    for (int i = -(16 << 13); i < 16 << 13; ++i) x.push_back(float(i) * 0x1p-13f);
    Random random(3);
    while (x.size() % 16 || x.size() < (32 << 13) + 200000) {
      const float v = bits_float(random.bits());
      if (std::isfinite(v)) x.push_back(v);
    }
    return x;
  }();
  return all;
}

}  // namespace

TEST_CASE("fp32 GELU is within 5e-7 of x * Phi(x)") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const std::vector<float> y = apply(k.probe.gelu, grid());
    double worst = 0;
    float at = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double error = std::fabs(y[i] - reference::gelu(grid()[i]));
      if (!(error <= worst)) worst = error, at = grid()[i];
    }
    CAPTURE(at);
    CHECK(worst < 5e-7);
    MESSAGE(k.name(), ": largest error ", worst, " at ", at);
  }
}

// Far below half a unit in the last place of bf16 (2e-3 relative), except for tiny results.
TEST_CASE("GELU is within 1.2e-4 relative plus 5e-7 of x * Phi(x), also where that is small") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const std::vector<float> y = apply(k.probe.gelu, grid());
    double worst = 0;  // of the allowed error
    float at = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double want = reference::gelu(grid()[i]);
      const double error = std::fabs(y[i] - want) / (1.2e-4 * std::fabs(want) + 5e-7);
      if (!(error <= worst)) worst = error, at = grid()[i];
    }
    CAPTURE(at);
    CHECK(worst < 1);
    MESSAGE(k.name(), ": largest error ", worst, " of the allowed at ", at);
  }
}

TEST_CASE("GELU's slope is within 1e-6, and its value the one of the forward pass") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const std::vector<float>& x = grid();
    const std::vector<float> forward = apply(k.probe.gelu, x);
    std::vector<float> y(x.size()), slope(x.size());
    k.probe.gelu_slope(x.data(), y.data(), slope.data(), int64_t(x.size()));
    double worst = 0;
    float at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      // For |x| > 13 the density is 2^-126 at least, times x.
      const double doubt = std::fabs(x[i]) > 13 ? std::fabs(x[i]) * 0x1p-126 : 0;
      const double error = std::fabs(slope[i] - reference::gelu_slope(x[i])) - doubt;
      if (!(error <= worst)) worst = error, at = x[i];
    }
    CAPTURE(at);
    CHECK(worst < 1e-6);
    CHECK(y == forward);
    MESSAGE(k.name(), ": largest error of the slope ", worst, " at ", at);
  }
}

TEST_CASE("GELU of NaN, infinities, zeros and the largest floats") {
  constexpr float kMax = std::numeric_limits<float>::max();
  const std::vector<float> x = {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF, 0.0f, -0.0f,
                                kMax,          -kMax,          1.0f,      2.0f,       3.0f, 4.0f,
                                5.0f,          6.0f,           7.0f,      8.0f};
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const std::vector<float> y = apply(k.probe.gelu, x);
    CHECK(std::isnan(y[0]));
    CHECK(std::isnan(y[1]));
    CHECK(y[2] == HUGE_VALF);
    CHECK(std::fabs(y[3]) <= 7e-9f);
    CHECK(y[4] == 0.0f);
    CHECK(y[5] == 0.0f);
    CHECK(y[6] == kMax);
    CHECK(std::fabs(y[7]) <= 7e-9f);
    CHECK(std::fabs(y[8] - 0.8413447f) < 5e-5f);  // a neighbour of NaN is not touched
  }
}
