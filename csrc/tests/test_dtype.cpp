// Conversions between fp32 and the 16-bit floats: vector loads and stores like the scalar functions. (What they give is
// compared with PyTorch's in tests/ops/test_values.py.)

#include <doctest/doctest.h>

#include "support.h"

using namespace cnk;
using namespace cnk::test;

TEST_CASE(
    "vector loads and stores convert like the scalar ones, every 16-bit float, and what is between them") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      CAPTURE(dtype_name(dtype));
      Tensor all(dtype, 65536);
      for (int bits = 0; bits < 65536; ++bits) static_cast<uint16_t*>(all.data())[bits] = uint16_t(bits);
      Buffer wide(65536 * 4);
      k.probe.load(dtype, all.data(), wide.as<float>(), 65536);
      int wrong = 0;
      for (int bits = 0; bits < 65536; ++bits) {
        const double got = wide.as<float>()[bits], want = all.get(bits);
        wrong += !(got == want && std::signbit(got) == std::signbit(want)) &&
                 !(std::isnan(got) && std::isnan(want));
      }
      CHECK(wrong == 0);

      // Each number moved by every quarter of the distance to the next one, to either side: ties, and both sides of them.
      const int drop = dtype == DType::kBFloat16 ? 16 : 13;  // bits of a float that have no place
      Tensor want(dtype, 65536 * 4), got(dtype, 65536 * 4);
      Buffer in(65536 * 4 * 4);
      for (int i = 0; i < 65536 * 4; ++i) {
        const float number =
            bits_float(float_bits(wide.as<float>()[i / 4]) + (uint32_t(i % 4) << (drop - 2)) + i % 3 - 1);
        // AVX512_BF16 treats subnormal inputs and results as zero; they are below 1.2e-38.
        const bool flushed =
            std::fabs(number) < 2 * std::numeric_limits<float>::min() && dtype == DType::kBFloat16;
        in.as<float>()[i] = flushed || std::isnan(number) ? 0 : number;
        want.set(i, in.as<float>()[i]);
      }
      k.probe.store(dtype, in.as<float>(), got.data(), 65536 * 4);
      CHECK(difference(got, want) == "");
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
