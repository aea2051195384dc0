// The inverted bottleneck and the fused block, with the four plans of cpu/mlp.cpp: tiles, columns, images, group; and the
// gradients, with and without GRN, with a hidden that is kept or computed again.

#include <doctest/doctest.h>

#include "common/variants.h"
#include "shapes.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Case {
  DType dtype;
  Image image;
  int64_t hidden;
  int kernel_size = 0;  // 0: the bottleneck alone
  bool grn = false, drop = false, residual = true;
  int schedule = kByShape;
  bool adaptive = false;  // a norm for each image
  // Of the gradients
  bool kept = false;
  DType weight_dtype = DType::kFloat32;  // of the forward pass: `dtype`
  Activation activation = Activation::kGelu;

  int64_t norms() const { return adaptive ? image.n : 1; }
  int64_t taps() const { return int64_t{kernel_size} * kernel_size; }
};

// x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, grn_weight, grn_bias
constexpr int kCount = 10, kWeights = 3, kGrn = 8;
bool is_weight(int i) { return i >= kWeights && i < kGrn; }

struct Problem {
  Case s;
  Tensor x, other, w1, w2, hidden;  // other: the residual, or dout; w1: (hidden, C), w2: (C, hidden)
  Buffer dw_weight, dw_bias, norm_weight, norm_bias, b1, grn_weight, grn_bias, b2, gamma, drop_scale;

  Problem(const Case& s, uint32_t seed) : Problem(s, Random(seed)) {}

  // What both directions are told of the problem.
  template <class Args>
  Args described(Products products) const {
    Args args = {};
    args.dtype = s.dtype;
    args.products = products;
    args.x = x.data();
    args.n = s.image.n;
    args.c = s.image.c;
    args.eps = args.grn_eps = 1e-6f;
    args.activation = s.activation;
    args.norm_weight = norm_weight.as<float>();
    args.norm_bias = norm_bias.as<float>();
    args.b1 = b1.as<float>();
    args.grn_weight = s.grn ? grn_weight.as<float>() : nullptr;
    args.b2 = b2.as<float>();
    args.gamma = gamma.as<float>();
    args.drop_scale = s.drop ? drop_scale.as<float>() : nullptr;
    return args;
  }

  Tensor run(const Kernels& k, Products products, int threads, Tensor* kept_y = nullptr,
             Tensor* kept_hidden = nullptr) {
    const int64_t c = s.image.c;
    Tensor out(s.dtype, x.count());
    Buffer packed1(k.ops.packed_bytes(products, w1.dtype(), s.hidden, c));
    Buffer packed2(k.ops.packed_bytes(products, w2.dtype(), c, s.hidden));
    in_team(threads, [&](Team& team) {
      k.ops.pack_matrix(products, w1.dtype(), w1.data(), s.hidden, c, packed1.as<void>(), team);
      k.ops.pack_matrix(products, w2.dtype(), w2.data(), c, s.hidden, packed2.as<void>(), team);
    });
    MlpArgs args = described<MlpArgs>(products);
    args.residual = s.residual ? other.data() : nullptr;
    args.out = out.data();
    args.h = s.image.h;
    args.w = s.image.w;
    args.hidden = s.hidden;
    args.kernel_h = args.kernel_w = s.kernel_size;
    args.dilation_h = args.dilation_w = 1;
    if (s.kernel_size) {
      args.dw_weight = dw_weight.as<float>();
      args.dw_bias = dw_bias.as<float>();
    }
    Buffer pairs(0);
    if (s.kernel_size && s.dtype == DType::kBFloat16 && k.pairs()) {
      pairs = packed_pairs(dw_weight, {0, 0, s.kernel_size}, {0, 0, s.kernel_size}, c);
      args.dw_pairs = pairs.as<float>();
    }
    args.norm_step = s.adaptive ? pad_channels(c) : 0;
    args.w1 = {packed1.as<void>(), s.hidden, c, w1.dtype()};
    args.w2 = {packed2.as<void>(), c, s.hidden, w2.dtype()};
    if (kept_y) args.kept_y = kept_y->data();
    if (kept_hidden) {
      args.kept_hidden = kept_hidden->data();
      args.kept_dtype = kept_hidden->dtype();
    }
    args.schedule = s.schedule;
    Buffer work = workspace(k.ops.mlp_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.mlp(args, team); });
    return out;
  }

  // Results that are not requested are missing in the arguments, and are empty tensors in the result.
  std::vector<Tensor> gradients(const Kernels& k, Products products, int threads, bool dx = true,
                                bool weights = true) {
    const int64_t c = s.image.c;
    Buffer packed(k.ops.packed_bytes(products, w1.dtype(), s.hidden, c));
    Buffer back2(k.ops.packed_bytes(products, DType::kFloat32, s.hidden, c));
    Buffer back1(k.ops.packed_bytes(products, DType::kFloat32, c, s.hidden));
    in_team(threads, [&](Team& team) {
      k.ops.pack_matrix(products, w1.dtype(), w1.data(), s.hidden, c, packed.as<void>(), team);
      k.ops.pack_transposed(products, w2.dtype(), w2.data(), s.hidden, c, gamma.as<float>(), back2.as<void>(),
                            team);
      k.ops.pack_transposed(products, w1.dtype(), w1.data(), c, s.hidden, nullptr, back1.as<void>(), team);
    });
    const int64_t counts[kCount] = {x.count(),    c, c, s.hidden * c, s.hidden,
                                    c * s.hidden, c, c, s.hidden,     s.hidden};
    std::vector<Tensor> out;
    float* results[kCount] = {};
    for (int i = 0; i < kCount; ++i) {
      const bool wanted = i < kWeights ? dx : is_weight(i) ? weights : s.grn;
      const bool matrix = i == 3 || i == 5;
      out.emplace_back(i == 0 ? s.dtype : matrix ? s.weight_dtype : DType::kFloat32, wanted ? counts[i] : 0);
      if (wanted) results[i] = static_cast<float*>(out[i].data());
    }
    MlpBackwardArgs args = described<MlpBackwardArgs>(products);
    args.dout = other.data();
    args.hidden = s.kept ? hidden.data() : nullptr;
    args.hidden_dtype = hidden.dtype();
    args.pixels = s.image.h * s.image.w;
    args.hidden_size = s.hidden;
    if (!s.kept) args.w1 = {packed.as<void>(), s.hidden, c, w1.dtype()};
    args.w2_back = {back2.as<void>(), s.hidden, c};
    args.w1_back = {back1.as<void>(), c, s.hidden};
    args.grn_bias = s.grn ? grn_bias.as<float>() : nullptr;
    args.w2 = w2.data();
    args.w2_dtype = w2.dtype();
    args.weights = weights;
    args.dx = results[0];
    args.dnorm_weight = results[1];
    args.dnorm_bias = results[2];
    args.dw1 = results[3];
    args.db1 = results[4];
    args.dw2 = results[5];
    args.db2 = results[6];
    args.dgamma = results[7];
    args.dgrn_weight = results[8];
    args.dgrn_bias = results[9];
    Buffer work = workspace(k.ops.mlp_backward_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.mlp_backward(args, team); });
    return out;
  }

 private:
  // Weights are 1 / sqrt(length of their sums), so that intermediate values are about 1.
  Problem(const Case& s, Random random)
      : s(s),
        x(s.dtype, random.floats(s.image.count(), -1.5, 2)),
        other(s.dtype, random.floats(s.image.count(), -1, 1)),
        w1(s.weight_dtype, scaled(random.floats(s.hidden * s.image.c, -1, 1), s.image.c)),
        w2(s.weight_dtype, scaled(random.floats(s.image.c * s.hidden, -1, 1), s.hidden)),
        hidden(s.dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16,
               random.floats(s.kept ? s.image.pixels() * s.hidden : 0, -3, 3)),
        dw_weight(packed_taps(Tensor(s.dtype, random.floats(s.taps() * s.image.c, -1, 1)).values(),
                              {0, 0, s.kernel_size}, {0, 0, s.kernel_size}, s.image.c)),
        dw_bias(padded(random.floats(s.image.c, -1, 1), s.image.c)),
        norm_weight(padded(random.floats(s.norms() * s.image.c, -2, 2), s.image.c)),
        norm_bias(padded(random.floats(s.norms() * s.image.c, -1, 1), s.image.c)),
        b1(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        grn_weight(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        grn_bias(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        b2(padded(random.floats(s.image.c, -1, 1), s.image.c)),
        gamma(padded(random.floats(s.image.c, -1, 1), s.image.c)),
        drop_scale(floats(random.floats(s.image.n, 0.5, 2))) {}

  static Values scaled(Values w, int64_t length) {
    for (double& v : w) v = float(v / std::sqrt(double(length)));
    return w;
  }
};

// `kept`: also what is kept for the gradient: the results are those without it.
void check(Case s, uint32_t seed, const Teams& teams = every_team(), bool kept = false) {
  s.weight_dtype = s.dtype;
  s.activation = Activation(seed % kActivations);
  Problem problem(s, seed);
  const DType hidden_dtype = s.dtype == DType::kFloat32 ? s.dtype : DType::kBFloat16;
  INFO("seed ", seed, ", dtype ", dtype_name(s.dtype), ", c ", s.image.c, ", hidden ", s.hidden,
       ", kernel_size ", s.kernel_size, ", grn ", s.grn, ", schedule ", s.schedule);
  const auto run = [&](const Kernels& k, Products products, int threads) {
    Tensor alone = problem.run(k, products, threads);
    if (!kept) return results(std::move(alone));
    Tensor y(s.dtype, s.kernel_size ? s.image.count() : 0), u(hidden_dtype, s.image.pixels() * s.hidden);
    Tensor out = problem.run(k, products, threads, s.kernel_size ? &y : nullptr, &u);
    CHECK(difference(alone, out) == "");
    if (s.kernel_size) {  // memory="min"
      Tensor only_y(s.dtype, s.image.count());
      CHECK(difference(problem.run(k, products, threads, &only_y), out) == "");
      CHECK(difference(only_y, y) == "");
    }
    return results(std::move(out), std::move(y), std::move(u));
  };
  check_sets(s.dtype, run, teams);
}

// `requests`: also with some of the gradients only.
void check_gradients(const Case& s, uint32_t seed, const Teams& teams, bool requests = true) {
  Problem problem(s, seed);
  INFO("seed ", seed, ", dtype ", dtype_name(s.dtype), ", w ", s.image.w, ", c ", s.image.c, ", hidden ",
       s.hidden, ", grn ", s.grn, ", kept ", s.kept);
  const auto run = [&](const Kernels& k, Products products, int threads) {
    std::vector<Tensor> out = problem.gradients(k, products, threads);
    // A gradient that is not requested is not written, and the others do not change.
    for (bool dx : {false, true}) {
      if (threads == 1 || !requests) break;
      const std::vector<Tensor> some = problem.gradients(k, products, threads, dx, !dx);
      for (int i = 0; i < kCount; ++i)
        if (some[i].count()) CHECK(difference(some[i], out[i]) == "");
    }
    return out;
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
        check({dtype, {2, 5, 7, c}, hidden, kernel_size, false, seed % 2 == 0, seed % 3 != 0}, seed,
              one_team(seed));
        check({dtype, {2, 4, 9, c}, hidden, kernel_size, true, seed % 2 == 1, seed % 3 != 1}, seed,
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
  check({DType::kBFloat16, {1, 4, 5, c}, 4 * c, 7, true, true}, 2, {5});
  check({DType::kFloat32, {3, 2, 11, c}, 4 * c - 5, 0, false, true, false}, 3,
        {3});  // above 64 rows: two threads or more
}

TEST_CASE("a norm for each image, in all plans") {
  const int64_t c = many_channels();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (Case s : {Case{dtype, {5, 1, 17, 33}, 49, 3}, Case{dtype, {3, 2, 5, c}, 4 * c},
                   Case{dtype, {5, 9, 20, 3}, 600, 3, true}, Case{dtype, {2, 33, 37, 20}, 40, 3, true}}) {
      s.adaptive = true;
      check(s, uint32_t(s.image.w));
    }
  }
}

TEST_CASE("GRN: groups of several images, the last one smaller") {
  // Two threads have room for a few of these images. If the last group is smaller, its rows are split in other
  // places. ThreadSanitizer shows whether a thread overwrites what another one still reads.
  check({DType::kFloat32, {5, 37, 20, 3}, 600, 3, true}, 1, {2});
  check({DType::kBFloat16, {9, 37, 20, 3}, 600, 0, true, true, false}, 2, {2});
}

TEST_CASE("GRN: images divided between threads, units of 32 rows and of more") {
  check({DType::kFloat32, {2, 33, 37, 20}, 40, 3, true, true}, 1);
  check({DType::kBFloat16, {2, 70, 71, 5}, 33, 0, true, false, false}, 2);
}

TEST_CASE("GRN: a hidden larger than 4 MB a thread is computed twice") {
  for (const Case& s : {Case{DType::kFloat32, {2, 57, 31, 3}, 1199, 3, true},
                        Case{DType::kBFloat16, {1, 50, 51, 5}, 896, 0, true}}) {
    check(s, 1, {2}, true);
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
        check({dtype, {2, 3, 5, 17}, 37, 3, grn, false, true, schedule}, seed, one_team(seed), true);
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

TEST_CASE(
    "gradients: every channel count, in every dtype, with and without GRN, drop scale and kept hidden") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (bool grn : {false, true}) {
        for (bool kept : {false, true}) {
          ++seed;
          const int64_t hidden = c * (1 + seed % 4) + (seed % 3 == 0);
          Case s = {dtype, {2, 5, 7, c}, hidden, 0, grn, seed % 2 == 0};
          s.kept = kept;
          s.activation = Activation(seed % 5);  // those whose slopes have no steps
          s.weight_dtype = kDTypes[seed % 2];
          check_gradients(s, seed, one_team(seed));
        }
      }
    }
  }
}

TEST_CASE("gradients: rows around the units and the register blocks") {
  uint32_t turn = 0;
  for (int64_t pixels : {1, 2, 5, 6, 7, 8, 31, 32, 33, 63, 64, 65, 97}) {
    check_gradients({DType::kFloat32, {1, 1, pixels, 17}, 33}, uint32_t(pixels), one_team(++turn));
    check_gradients({DType::kBFloat16, {2, 1, pixels, 33}, 65, 0, pixels % 2 == 0, true}, uint32_t(pixels),
                    one_team(++turn));
  }
}

TEST_CASE("gradients: groups of rows, the last one smaller") {
  check_gradients({DType::kFloat32, {1, 57, 55, 3}, 5}, 1, every_team());
  check_gradients({DType::kBFloat16, {3, 7, 100, 8}, 33, 0, false, true, true, kByShape, false, true}, 2,
                  every_team());
}

TEST_CASE("gradients: groups of several images and a smaller rest, one image larger than a group's budget") {
  check_gradients({DType::kFloat32, {5, 57, 20, 3}, 400, 0, true}, 1, {2}, false);
  check_gradients({DType::kBFloat16, {5, 57, 20, 3}, 400, 0, true, true, true, kByShape, false, true}, 2, {3},
                  false);
  check_gradients({DType::kFloat32, {2, 57, 31, 3}, 1599, 0, true}, 3, {5}, false);
}

TEST_CASE("gradients: weights larger than L2") {
  int64_t c = 100;
  while (3 * c * c * 2 <= 2 * l2_cache_bytes()) c += 20;
  check_gradients({DType::kFloat32, {1, 7, 10, c}, c}, 1, {2}, false);
}
