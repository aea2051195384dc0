// Conversions between fp32 and the 16-bit floats: every bit pattern, scalar and vector.

#include <doctest/doctest.h>

#include "support.h"

using namespace cnk;
using namespace cnk::test;

namespace {

// A 16-bit format, written from its definition.
struct Format {
  DType dtype;
  int mantissa_bits, bias;
  int exponent_bits() const { return 15 - mantissa_bits; }
  int top() const { return (1 << exponent_bits()) - 1; }
  double value(uint16_t bits) const {
    const int exponent = bits >> mantissa_bits & top(), mantissa = bits & ((1 << mantissa_bits) - 1);
    double magnitude;
    if (exponent == top()) {
      magnitude = mantissa ? std::nan("") : HUGE_VAL;
    } else if (exponent == 0) {
      magnitude = std::ldexp(mantissa, 1 - bias - mantissa_bits);
    } else {
      magnitude = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    }
    return bits >> 15 ? -magnitude : magnitude;
  }
  bool is_nan(uint16_t bits) const { return std::isnan(value(bits)); }
  // To nearest, ties to even: a whole number of units in
  // the last place that the format has at this magnitude.
  double round(double v) const {
    if (std::isnan(v) || std::isinf(v)) return v;
    const int exponent = v == 0 ? 1 - bias : std::max(std::ilogb(v), 1 - bias);
    const double rounded =
        std::ldexp(std::nearbyint(std::ldexp(v, mantissa_bits - exponent)), exponent - mantissa_bits);
    return std::fabs(rounded) > value(uint16_t((top() << mantissa_bits) - 1)) ? std::copysign(HUGE_VAL, v)
                                                                              : rounded;
  }
  float widen(uint16_t bits) const {
    return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
  }
  uint16_t narrow(float v) const {
    BFloat16 bf16;
    Float16 fp16;
    if (dtype == DType::kBFloat16) {
      from_float(v, bf16);
      return bf16.bits;
    }
    from_float(v, fp16);
    return fp16.bits;
  }
};

const Format kFormats[] = {{DType::kBFloat16, 7, 127}, {DType::kFloat16, 10, 15}};

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Every finite value, every tie between neighbours, the
// floats next to each, and values that overflow; both signs.
std::vector<float> floats_to_round(const Format& format) {
  std::vector<float> out = {0.0f,
                            std::numeric_limits<float>::denorm_min(),
                            std::numeric_limits<float>::min(),
                            std::numeric_limits<float>::max(),
                            HUGE_VALF,
                            std::nanf("")};
  const int finite = format.top() << format.mantissa_bits;
  for (int bits = 0; bits < finite; ++bits) {
    const double here = format.value(uint16_t(bits));
    const double step =
        bits + 1 < finite ? format.value(uint16_t(bits + 1)) - here : here - format.value(bits - 1);
    const float tie = float(here + step / 2);
    for (float v : {float(here), tie}) {
      out.insert(out.end(), {std::nextafter(v, 0.0f), v, std::nextafter(v, HUGE_VALF)});
    }
  }
  Random random(7);
  for (int i = 0; i < 100000; ++i) out.push_back(bits_float(random.bits()));
  const size_t count = out.size();
  for (size_t i = 0; i < count; ++i) out.push_back(-out[i]);
  while (out.size() % 16) out.push_back(1.0f);
  return out;
}

}  // namespace

TEST_CASE("16-bit floats widen exactly, all 65536 of them") {
  for (const Format& format : kFormats) {
    CAPTURE(dtype_name(format.dtype));
    int wrong = 0;
    for (int bits = 0; bits < 65536; ++bits)
      wrong += !same(format.widen(uint16_t(bits)), format.value(uint16_t(bits)));
    CHECK(wrong == 0);
  }
}

TEST_CASE("fp32 rounds to the nearest 16-bit float, ties to even") {
  for (const Format& format : kFormats) {
    CAPTURE(dtype_name(format.dtype));
    int wrong = 0;
    for (float v : floats_to_round(format)) {
      const bool right = same(format.value(format.narrow(v)), format.round(v));
      if (!right && wrong++ == 0) MESSAGE("first wrong: ", v, " gives ", format.value(format.narrow(v)));
    }
    CHECK(wrong == 0);
  }
  // A few by hand, because the rule above may be wrong too.
  const Format &bf16 = kFormats[0], &fp16 = kFormats[1];
  CHECK(bf16.narrow(1.0f + 0x1p-8f) == 0x3f80);  // tie: down to even
  CHECK(bf16.narrow(1.0f + 0x3p-8f) == 0x3f82);  // tie: up to even
  CHECK(bf16.narrow(3.4e38f) == 0x7f80);
  CHECK(fp16.narrow(2049.0f) == fp16.narrow(2048.0f));
  CHECK(fp16.narrow(2051.0f) == fp16.narrow(2052.0f));
  CHECK(fp16.narrow(65519.0f) == 0x7bff);
  CHECK(fp16.narrow(65520.0f) == 0x7c00);
  CHECK(fp16.narrow(0x1p-24f) == 0x0001);
  CHECK(fp16.narrow(0x1p-25f) == 0x0000);  // tie between 0 and the smallest
  CHECK(fp16.narrow(-0x1.8p-25f) == 0x8001);
}

TEST_CASE("vector loads and stores convert like the scalar ones") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (const Format& format : kFormats) {
      CAPTURE(dtype_name(format.dtype));
      Buffer patterns(65536 * 2), wide(65536 * 4);
      for (int bits = 0; bits < 65536; ++bits) patterns.as<uint16_t>()[bits] = uint16_t(bits);
      k.probe.load(format.dtype, patterns.as<void>(), wide.as<float>(), 65536);
      int wrong = 0;
      for (int bits = 0; bits < 65536; ++bits) {
        wrong += !same(wide.as<float>()[bits], format.widen(uint16_t(bits)));
      }
      CHECK(wrong == 0);

      const std::vector<float> source = floats_to_round(format);
      Buffer in(int64_t(source.size()) * 4), out(int64_t(source.size()) * 2);
      std::memcpy(in.as<void>(), source.data(), source.size() * 4);
      k.probe.store(format.dtype, in.as<float>(), out.as<void>(), int64_t(source.size()));
      wrong = 0;
      // AVX512_BF16 treats subnormal inputs and results as zero; they are below 1.2e-38.
      const bool flushes =
          (k.isa == Isa::kAvx512Bf16 || k.isa == Isa::kAmx) && format.dtype == DType::kBFloat16;
      for (size_t i = 0; i < source.size(); ++i) {
        const bool flushed = flushes && std::fabs(source[i]) < std::numeric_limits<float>::min();
        const uint16_t want = format.narrow(flushed ? std::copysign(0.0f, source[i]) : source[i]);
        const uint16_t got = out.as<uint16_t>()[i];
        const bool right = format.is_nan(want) ? format.is_nan(got) && (got ^ want) < 0x8000 : got == want;
        if (!right && wrong++ == 0) MESSAGE("first wrong: ", source[i], " gives ", format.value(got));
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("partial loads and stores touch the first n elements only") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (DType dtype : kDTypes) {
      CAPTURE(dtype_name(dtype));
      for (int n = 1; n < k.probe.lanes; ++n) {
        CAPTURE(n);
        Tensor x(dtype, n);
        for (int i = 0; i < n; ++i) x.set(i, i + 0.5);
        Buffer lanes(k.probe.lanes * 4);
        k.probe.load_partial(dtype, x.data(), n, lanes.as<float>());
        int wrong = 0;
        for (int i = 0; i < k.probe.lanes; ++i) wrong += lanes.as<float>()[i] != (i < n ? i + 0.5f : 0.0f);
        CHECK(wrong == 0);

        Tensor short_out(dtype, n), long_out(dtype, k.probe.lanes);
        k.probe.store_partial(dtype, lanes.as<float>(), n, short_out.data());
        k.probe.store_partial(dtype, lanes.as<float>(), n, long_out.data());
        CHECK(difference(short_out, x) == "");
        CHECK(long_out.same_bits(x, 0, n));
        CHECK(long_out.same_bits(Tensor(dtype, k.probe.lanes), n, k.probe.lanes));
      }
    }
  }
}
