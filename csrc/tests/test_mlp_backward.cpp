// The gradients of the inverted bottleneck, with and without
// GRN, with a hidden that is kept or computed again.

#include <doctest/doctest.h>

#include "shapes.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Case {
  DType dtype;
  int64_t n, pixels, c, hidden;
  bool grn = false, drop = false, kept = false;
  DType weight_dtype = DType::kFloat32;
};

// x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, grn_weight, grn_bias
constexpr int kCount = 10, kWeights = 3, kGrn = 8;
bool is_weight(int i) { return i >= kWeights && i < kGrn; }

struct Problem {
  Case s;
  Tensor x, dout, w1, w2, hidden;  // w1: (hidden, C), w2: (C, hidden)
  Buffer norm_weight, norm_bias, b1, b2, gamma, grn_weight, grn_bias, drop_scale;
  static constexpr float kEps = 1e-6f, kGrnEps = 1e-6f;

  Problem(const Case& s, uint32_t seed) : Problem(s, Random(seed)) {}

  // Results that are not requested are missing in the arguments, and are empty tensors in the result.
  std::vector<Tensor> run(const Kernels& k, Products products, int threads, bool dx = true,
                          bool weights = true) {
    Buffer packed(k.ops.packed_bytes(products, w1.dtype(), s.hidden, s.c));
    Buffer back2(k.ops.packed_bytes(products, DType::kFloat32, s.hidden, s.c));
    Buffer back1(k.ops.packed_bytes(products, DType::kFloat32, s.c, s.hidden));
    in_team(threads, [&](Team& team) {
      k.ops.pack_matrix(products, w1.dtype(), w1.data(), s.hidden, s.c, packed.as<void>(), team);
      k.ops.pack_transposed(products, w2.dtype(), w2.data(), s.hidden, s.c, gamma.as<float>(),
                            back2.as<void>(), team);
      k.ops.pack_transposed(products, w1.dtype(), w1.data(), s.c, s.hidden, nullptr, back1.as<void>(), team);
    });
    const int64_t counts[kCount] = {x.count(),      s.c, s.c, s.hidden * s.c, s.hidden,
                                    s.c * s.hidden, s.c, s.c, s.hidden,       s.hidden};
    std::vector<Tensor> out;
    float* results[kCount] = {};
    for (int i = 0; i < kCount; ++i) {
      const bool wanted = i < kWeights ? dx : is_weight(i) ? weights : s.grn;
      const bool matrix = i == 3 || i == 5;
      out.emplace_back(i == 0 ? s.dtype : matrix ? s.weight_dtype : DType::kFloat32, wanted ? counts[i] : 0);
      if (wanted) results[i] = static_cast<float*>(out[i].data());
    }
    MlpBackwardArgs args = {};
    args.dtype = s.dtype;
    args.products = products;
    args.x = x.data();
    args.dout = dout.data();
    args.hidden = s.kept ? hidden.data() : nullptr;
    args.hidden_dtype = hidden.dtype();
    args.n = s.n;
    args.pixels = s.pixels;
    args.c = s.c;
    args.hidden_size = s.hidden;
    args.eps = kEps;
    args.grn_eps = kGrnEps;
    args.norm_weight = norm_weight.as<float>();
    args.norm_bias = norm_bias.as<float>();
    if (!s.kept) args.w1 = {packed.as<void>(), s.hidden, s.c, w1.dtype()};
    args.w2_back = {back2.as<void>(), s.hidden, s.c};
    args.w1_back = {back1.as<void>(), s.c, s.hidden};
    args.b1 = b1.as<float>();
    if (s.grn) {
      args.grn_weight = grn_weight.as<float>();
      args.grn_bias = grn_bias.as<float>();
    }
    args.w2 = w2.data();
    args.w2_dtype = w2.dtype();
    args.b2 = b2.as<float>();
    args.gamma = gamma.as<float>();
    args.drop_scale = s.drop ? drop_scale.as<float>() : nullptr;
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
        x(s.dtype, random.floats(s.n * s.pixels * s.c, -1.5, 2)),
        dout(s.dtype, random.floats(s.n * s.pixels * s.c, -1, 1)),
        w1(s.weight_dtype, scaled(random.floats(s.hidden * s.c, -1, 1), s.c)),
        w2(s.weight_dtype, scaled(random.floats(s.c * s.hidden, -1, 1), s.hidden)),
        hidden(s.dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16,
               random.floats(s.kept ? s.n * s.pixels * s.hidden : 0, -3, 3)),
        norm_weight(padded(random.floats(s.c, -2, 2), s.c)),
        norm_bias(padded(random.floats(s.c, -1, 1), s.c)),
        b1(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        b2(padded(random.floats(s.c, -1, 1), s.c)),
        gamma(padded(random.floats(s.c, -1, 1), s.c)),
        grn_weight(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        grn_bias(padded(random.floats(s.hidden, -1, 1), s.hidden)),
        drop_scale(floats(random.floats(s.n, 0.5, 2))) {}

  static Values scaled(Values w, int64_t length) {
    for (double& v : w) v = float(v / std::sqrt(double(length)));
    return w;
  }
};

// `requests`: also with some of the gradients only.
void check(const Case& s, uint32_t seed, const Teams& teams, bool requests = true) {
  Problem problem(s, seed);
  INFO("seed ", seed, ", dtype ", dtype_name(s.dtype), ", pixels ", s.pixels, ", c ", s.c, ", hidden ",
       s.hidden, ", grn ", s.grn, ", kept ", s.kept);
  const auto run = [&](const Kernels& k, Products products, int threads) {
    std::vector<Tensor> out = problem.run(k, products, threads);
    // A gradient that is not requested is not written, and the others do not change.
    for (bool dx : {false, true}) {
      if (threads == 1 || !requests) break;
      const std::vector<Tensor> some = problem.run(k, products, threads, dx, !dx);
      for (int i = 0; i < kCount; ++i)
        if (some[i].count()) CHECK(difference(some[i], out[i]) == "");
    }
    return out;
  };
  check_sets(s.dtype, run, teams);
}

}  // namespace

TEST_CASE("every channel count, in every dtype, with and without GRN, drop scale and kept hidden") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (bool grn : {false, true}) {
        for (bool kept : {false, true}) {
          ++seed;
          const int64_t hidden = c * (1 + seed % 4) + (seed % 3 == 0);
          check({dtype, 2, 35, c, hidden, grn, seed % 2 == 0, kept, kDTypes[seed % 2]}, seed, one_team(seed));
        }
      }
    }
  }
}

TEST_CASE("rows around the units and the register blocks") {
  uint32_t turn = 0;
  for (int64_t pixels : {1, 2, 5, 6, 7, 8, 31, 32, 33, 63, 64, 65, 97}) {
    check({DType::kFloat32, 1, pixels, 17, 33}, uint32_t(pixels), one_team(++turn));
    check({DType::kBFloat16, 2, pixels, 33, 65, pixels % 2 == 0, true}, uint32_t(pixels), one_team(++turn));
  }
}

TEST_CASE("groups: more rows than one holds, the last one smaller") {
  check({DType::kFloat32, 1, 57 * 55, 3, 5}, 1, every_team());
  check({DType::kBFloat16, 3, 700, 8, 33, false, true, true}, 2, every_team());
}

TEST_CASE("GRN groups: several images and a smaller rest, one image larger than a group's budget") {
  check({DType::kFloat32, 5, 57 * 20, 3, 400, true}, 1, {2}, false);
  check({DType::kBFloat16, 5, 57 * 20, 3, 400, true, true, true}, 2, {3}, false);
  check({DType::kFloat32, 2, 57 * 31, 3, 1599, true}, 3, {5}, false);
}

TEST_CASE("weights larger than L2") {
  int64_t c = 100;
  while (3 * c * c * 2 <= 2 * l2_cache_bytes()) c += 20;
  check({DType::kFloat32, 1, 70, c, c}, 1, {2}, false);
}
