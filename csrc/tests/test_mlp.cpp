// The inverted bottleneck and the fused block, with the
// four plans of cpu/mlp.cpp: tiles, columns, images, group.

#include <doctest/doctest.h>

#include "shapes.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Case {
  DType dtype;
  Image image;
  int64_t hidden;
  int kernel_size = 0, dilation = 1;
  bool grn = false, drop = false, residual = true;
  int kernel_w = 0;        // 0: kernel_size
  int64_t dilation_w = 0;  // 0: dilation
  int schedule = kByShape;
  bool adaptive = false;  // a norm for each image

  int64_t norms() const { return adaptive ? image.n : 1; }
  Convolution convolution() const {
    return {kernel_size, kernel_w ? kernel_w : kernel_size, dilation, dilation_w ? dilation_w : dilation};
  }
};

struct Problem {
  Case s;
  Tensor x, residual, w1, w2;  // all of one dtype
  Buffer dw_weight, dw_bias, norm_weight, norm_bias, b1, grn_weight, b2, gamma, drop_scale;
  static constexpr float kEps = 1e-6f, kGrnEps = 1e-6f;

  Problem(const Case& s, uint32_t seed) : Problem(s, Random(seed)) {}

  Tensor run(const Kernels& k, Products products, int threads, Tensor* kept_y = nullptr,
             Tensor* kept_hidden = nullptr, double* phases = nullptr) {
    Tensor out(s.dtype, x.count());
    Buffer packed1(k.ops.packed_bytes(products, s.dtype, s.hidden, s.image.c));
    Buffer packed2(k.ops.packed_bytes(products, s.dtype, s.image.c, s.hidden));
    in_team(threads, [&](Team& team) {
      k.ops.pack_matrix(products, s.dtype, w1.data(), s.hidden, s.image.c, packed1.as<void>(), team);
      k.ops.pack_matrix(products, s.dtype, w2.data(), s.image.c, s.hidden, packed2.as<void>(), team);
    });
    MlpArgs args = {};
    args.dtype = s.dtype;
    args.products = products;
    args.x = x.data();
    args.residual = s.residual ? residual.data() : nullptr;
    args.out = out.data();
    args.n = s.image.n;
    args.h = s.image.h;
    args.w = s.image.w;
    args.c = s.image.c;
    args.hidden = s.hidden;
    const Convolution conv = s.convolution();
    args.kernel_h = conv.kernel_h;
    args.kernel_w = conv.kernel_w;
    args.dilation_h = conv.dilation_h;
    args.dilation_w = conv.dilation_w;
    if (s.kernel_size) {
      args.dw_weight = dw_weight.as<float>();
      args.dw_bias = dw_bias.as<float>();
    }
    Buffer pairs(0);
    if (s.kernel_size && s.dtype == DType::kBFloat16 && k.pairs()) {
      pairs = packed_pairs(dw_weight, {0, 0, conv.kernel_h}, {0, 0, conv.kernel_w}, s.image.c);
      args.dw_pairs = pairs.as<float>();
    }
    args.eps = kEps;
    args.grn_eps = kGrnEps;
    args.norm_weight = norm_weight.as<float>();
    args.norm_bias = norm_bias.as<float>();
    args.norm_step = s.adaptive ? pad_channels(s.image.c) : 0;
    args.w1 = {packed1.as<void>(), s.hidden, s.image.c, s.dtype};
    args.w2 = {packed2.as<void>(), s.image.c, s.hidden, s.dtype};
    args.b1 = b1.as<float>();
    args.grn_weight = s.grn ? grn_weight.as<float>() : nullptr;
    args.b2 = b2.as<float>();
    args.gamma = gamma.as<float>();
    args.drop_scale = s.drop ? drop_scale.as<float>() : nullptr;
    if (kept_y) args.kept_y = kept_y->data();
    if (kept_hidden) {
      args.kept_hidden = kept_hidden->data();
      args.kept_dtype = kept_hidden->dtype();
    }
    args.phases = phases;
    args.schedule = s.schedule;
    Buffer work = workspace(k.ops.mlp_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.mlp(args, team); });
    return out;
  }

 private:
  Problem(const Case& s, Random random)
      : s(s),
        x(s.dtype, random.floats(s.image.count(), -1.5, 2)),
        residual(s.dtype, random.floats(s.image.count(), -2, 2)),
        w1(s.dtype, random.floats(s.hidden * s.image.c, -1, 1)),
        w2(s.dtype, random.floats(s.image.c * s.hidden, -1, 1)),
        dw_weight(
            packed_taps(Tensor(s.dtype, random.floats(s.convolution().taps() * s.image.c, -1, 1)).values(),
                        {0, 0, s.convolution().kernel_h}, {0, 0, s.convolution().kernel_w}, s.image.c)),
        dw_bias(padded(random.floats(s.image.c, -1, 1), s.image.c)),
        norm_weight(padded(random.floats(s.norms() * s.image.c, -2, 2), s.image.c)),
        norm_bias(padded(random.floats(s.norms() * s.image.c, -1, 1), s.image.c)),
        b1(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        grn_weight(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        b2(padded(random.floats(s.image.c, -1, 1), s.image.c)),
        gamma(padded(random.floats(s.image.c, -1, 1), s.image.c)),
        drop_scale(floats(random.floats(s.image.n, 0.5, 2))) {}
};

void check(const Case& s, uint32_t seed, const Teams& teams = every_team()) {
  Problem problem(s, seed);
  INFO("seed ", seed, ", dtype ", dtype_name(s.dtype), ", c ", s.image.c, ", hidden ", s.hidden,
       ", kernel_size ", s.kernel_size, ", grn ", s.grn);
  const auto run = [&](const Kernels& k, Products products, int threads) {
    return results(problem.run(k, products, threads));
  };
  check_sets(s.dtype, run, teams);
}

// The same, with what is kept for the gradient: the results are those without it.
void check_kept(const Case& s, uint32_t seed, const Teams& teams) {
  Problem problem(s, seed);
  const DType hidden_dtype = s.dtype == DType::kFloat32 ? s.dtype : DType::kBFloat16;
  INFO("dtype ", dtype_name(s.dtype), ", hidden ", s.hidden, ", grn ", s.grn, ", schedule ", s.schedule);
  const auto run = [&](const Kernels& k, Products products, int threads) {
    Tensor y(s.dtype, s.kernel_size ? s.image.count() : 0), u(hidden_dtype, s.image.pixels() * s.hidden);
    Tensor out = problem.run(k, products, threads, s.kernel_size ? &y : nullptr, &u);
    CHECK(difference(problem.run(k, products, threads), out) == "");
    if (s.kernel_size) {  // memory="min"
      Tensor alone(s.dtype, s.image.count());
      CHECK(difference(problem.run(k, products, threads, &alone), out) == "");
      CHECK(difference(alone, y) == "");
    }
    return results(std::move(out), std::move(y), std::move(u));
  };
  check_sets(s.dtype, run, teams);
}

// Channels whose weights, 4 * C wide, exceed L2 in fp32 and in bf16: the plan "columns" needs that.
int64_t many_channels() {
  int64_t c = 100;
  while (2 * c * 4 * c * 2 <= l2_cache_bytes()) c += 20;
  return c;
}

}  // namespace

TEST_CASE(
    "tiles: every channel count, in every dtype, with and without convolution, GRN, drop scale and "
    "residual") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int kernel_size : {0, 7, 3}) {
        ++seed;
        const int64_t hidden = c * (1 + seed % 4);  // mlp_ratio 1 to 4
        check({dtype, {2, 5, 7, c}, hidden, kernel_size, 1, false, seed % 2 == 0, seed % 3 != 0}, seed,
              one_team(seed));
        check({dtype, {2, 4, 9, c}, hidden, kernel_size, 1, true, seed % 2 == 1, seed % 3 != 1}, seed,
              one_team(seed + 1));
      }
    }
  }
}

TEST_CASE("tiles: pixels around the rows of a product's block") {
  uint32_t turn = 0;
  for (int64_t w : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 57, 63, 64, 65, 127, 128, 129}) {
    check({DType::kFloat32, {1, 1, w, 33}, 49, 3}, uint32_t(w), one_team(++turn));
    check({DType::kBFloat16, {1, w, 1, 17}, 65, 0}, uint32_t(w), one_team(++turn));
  }
}

TEST_CASE("columns: few pixels, weights larger than L2") {
  const int64_t c = many_channels();
  check({DType::kFloat32, {1, 3, 5, c}, 4 * c, 3}, 1, {2});
  check({DType::kBFloat16, {1, 4, 5, c}, 4 * c, 7, 1, true, true}, 2, {5});
  check({DType::kFloat32, {3, 2, 11, c}, 4 * c - 5, 0, 1, false, true, false}, 3,
        {3});  // above 64 rows: two threads or more
}

TEST_CASE("a norm for each image, in all plans") {
  const int64_t c = many_channels();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (Case s :
         {Case{dtype, {5, 1, 17, 33}, 49, 3}, Case{dtype, {3, 2, 5, c}, 4 * c},
          Case{dtype, {5, 9, 20, 3}, 600, 3, 1, true}, Case{dtype, {2, 33, 37, 20}, 40, 3, 1, true}}) {
      s.adaptive = true;
      check(s, uint32_t(s.image.w));
    }
  }
}

TEST_CASE("GRN: groups of several images, the last one smaller") {
  // Two threads have room for a few of these images. If the last group is smaller, its rows are split in other
  // places. ThreadSanitizer shows whether a thread overwrites what another one still reads.
  check({DType::kFloat32, {5, 37, 20, 3}, 600, 3, 1, true}, 1, {2});
  check({DType::kBFloat16, {9, 37, 20, 3}, 600, 0, 1, true, true, false}, 2, {2});
}

TEST_CASE("GRN: images divided between threads, units of 32 rows and of more") {
  check({DType::kFloat32, {2, 33, 37, 20}, 40, 3, 1, true, true}, 1);
  check({DType::kBFloat16, {2, 70, 71, 5}, 33, 0, 1, true, false, false}, 2);
}

TEST_CASE("GRN: a hidden larger than 4 MB a thread is computed twice") {
  for (const Case& s : {Case{DType::kFloat32, {2, 57, 31, 3}, 1199, 3, 1, true},
                        Case{DType::kBFloat16, {1, 50, 51, 5}, 896, 0, 1, true}}) {
    check_kept(s, 1, {2});
  }
}

TEST_CASE("memory: 4 MB for each thread, whatever the image") {
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (Products products : k.products()) {
      for (bool grn : {false, true}) {
        for (int64_t c : {8, 96, 384, 768, 1024}) {
          for (int64_t side : {1, 7, 14, 56, 128, 512}) {
            for (int threads : {1, 2, 4, 16}) {
              INFO("grn ", grn, ", c ", c, ", side ", side, ", threads ", threads);
              MlpArgs args = {};
              args.products = products;
              args.n = 8;
              args.h = args.w = side;
              args.c = c;
              args.hidden = 4 * c;
              const float weight = 0;
              args.grn_weight = grn ? &weight : nullptr;
              for (args.schedule = kByShape; args.schedule < kMlpSchedules; ++args.schedule) {
                CAPTURE(args.schedule);
                CHECK(k.ops.mlp_workspace(args, threads) <= threads * (int64_t{4} << 20));
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("what is kept for the gradient; the result stays the same") {
  uint32_t seed = 300;
  for (DType dtype : kDTypes) {
    for (bool grn : {false, true}) {
      for (int schedule : {kByShape, kSplitColumns}) {
        ++seed;
        check_kept({dtype, {2, 3, 5, 17}, 37, 3, 1, grn, false, true, 0, 0, schedule}, seed, one_team(seed));
      }
    }
  }
}

TEST_CASE("the tile configuration of the calling thread is left as it was") {
  for (const Kernels& k : kernels()) {
    if (!k.probe.set_tiles) continue;
    Problem problem({DType::kBFloat16, {1, 3, 5, 33}, 66, 3}, 9);
    alignas(64) uint8_t before[64] = {}, after[64];
    before[0] = 1;    // palette
    before[16] = 32;  // bytes of a row of tile 0
    before[48] = 5;   // rows of tile 0
    k.probe.set_tiles(before);
    problem.run(k, Products::kBFloat16, 1);
    k.probe.get_tiles(after);
    CHECK(std::memcmp(before, after, 64) == 0);
    const uint8_t none[64] = {};
    k.probe.set_tiles(none);
    problem.run(k, Products::kBFloat16, 1);
    k.probe.get_tiles(after);
    CHECK(std::memcmp(none, after, 64) == 0);
  }
}
