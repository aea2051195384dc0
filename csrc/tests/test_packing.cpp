// Packing of matrices for the products: a transposed matrix gives the same as one transposed by hand.

#include <doctest/doctest.h>

#include "support.h"

using namespace cnk;
using namespace cnk::test;

TEST_CASE("a square of registers is transposed") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const int lanes = k.probe.lanes;
    Buffer rows(int64_t{lanes} * lanes * 4);
    for (int i = 0; i < lanes * lanes; ++i) rows.as<float>()[i] = float(i);
    k.probe.transpose(rows.as<float>());
    int wrong = 0;
    for (int i = 0; i < lanes * lanes; ++i)
      wrong += rows.as<float>()[i] != float(i % lanes * lanes + i / lanes);
    CHECK(wrong == 0);
  }
}

// pack_transposed expects w (k, n), pack_matrix the same as (n, k).
TEST_CASE("pack_transposed gives the bits of pack_matrix, with and without a scale of its rows") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t n : {1, 3, 16, 17, 32, 47, 48, 49, 100}) {
      for (int64_t depth : {1, 2, 15, 31, 32, 33, 65}) {
        Random random(++seed);
        Values values = random.floats(depth * n, -64, 64);
        for (double& v : values) v = std::round(v) / 64;
        const Tensor w(dtype, values);
        // Few bits and powers of two, so that the product is exact in every dtype.
        Values scale(depth);
        for (double& s : scale) s = std::ldexp(1.0, int(random.bits() % 5) - 2);
        Buffer scale_ = floats(scale);
        Tensor turned(DType::kFloat32, n * depth), scaled(DType::kFloat32, n * depth);
        for (int64_t i = 0; i < depth; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            turned.set(j * depth + i, w.get(i * n + j));
            scaled.set(j * depth + i, w.get(i * n + j) * scale[i]);
          }
        }
        CAPTURE(dtype_name(dtype));
        CAPTURE(n);
        CAPTURE(depth);
        for (const Kernels& k : kernels()) {
          CAPTURE(k.name());
          for (Products products : k.products()) {
            CAPTURE(products_name(products));
            const int64_t bytes = k.ops.packed_bytes(products, DType::kFloat32, n, depth);
            for (bool with_scale : {false, true}) {
              Buffer expected(bytes);
              in_team(1, [&](Team& team) {
                k.ops.pack_matrix(products, DType::kFloat32, (with_scale ? scaled : turned).data(), n, depth,
                                  expected.as<void>(), team);
              });
              for (int threads : {1, 3}) {
                Buffer packed(bytes);
                in_team(threads, [&](Team& team) {
                  k.ops.pack_transposed(products, dtype, w.data(), n, depth,
                                        with_scale ? scale_.as<float>() : nullptr, packed.as<void>(), team);
                });
                CHECK(std::memcmp(packed.as<char>(), expected.as<char>(), bytes) == 0);
              }
            }
          }
        }
      }
    }
  }
}
